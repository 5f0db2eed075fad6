"""Options that several commands have, and how a command ends where the user can mend something."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fedflame.cli.ending import ends_when_told
from fedflame.commands.quiet import quiet_libraries
from fedflame.config.load import load_config
from fedflame.config.run_config import RunConfig
from fedflame.errors import USER_ERROR, NotFinite, UserError

CELL_FAILED = 1
CHECK_FAILED = 1
NOT_FINITE = 1

ConfigFile = Annotated[
    Path | None, typer.Argument(help="TOML file; without it, the embedded model and data.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, over the file; may be repeated.")
]
Data = Annotated[
    str | None, typer.Option("--data", help="`skills`, a data file or a hub id (data.dataset_name).")
]
Scored = Annotated[
    str | None,
    typer.Option("--data", help="A data file or a hub id, all rows of which are scored; or `skills`."),
]
Model = Annotated[
    str | None, typer.Option("--model", help="`olmoe-tiny`, a folder or a hub id (model.model_name_or_path).")
]
Device = Annotated[
    str | None, typer.Option("--device", help="`auto`, `cpu`, `cuda` or `cuda:N` (model.device).")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def config_of(
    config_file: Path | None,
    overrides: list[str] | None,
    data: str | None,
    model: str | None,
    device: str | None = None,
    output_dir: str | None = None,
) -> RunConfig:
    """The configuration of a command's file and options."""
    return load_config(config_file, flags(overrides, data, model, device, output_dir))


def flags(
    overrides: list[str] | None,
    data: str | None,
    model: str | None,
    device: str | None = None,
    output_dir: str | None = None,
) -> list[str]:
    """The short flags as overrides; they come last and win."""
    short = {
        "data.dataset_name": data,
        "model.model_name_or_path": model,
        "model.device": device,
        "output_dir": output_dir,
    }
    return [*(overrides or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]


@contextmanager
def user_errors(debug: bool) -> Iterator[None]:
    """The body of a command: quiet libraries, and one line on stderr for what the user can mend or ended."""
    quiet_libraries()
    with ends_when_told(), _errors_in_one_line(debug):
        yield


@contextmanager
def _errors_in_one_line(debug: bool) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if debug:
            raise
        print(f"fedflame: {error}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from error
    except NotFinite as error:
        print(f"fedflame: {error}", file=sys.stderr)
        raise typer.Exit(NOT_FINITE) from error
