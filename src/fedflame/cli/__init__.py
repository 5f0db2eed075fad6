"""The `fedflame` command. Arguments are parsed first; torch is imported by the work that needs it.

`runs` has the commands of one experiment and of comparisons, `federation` those of hubs and sites.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fedflame import __version__
from fedflame.cli import federation, runs

app = typer.Typer(
    help="Federated fine-tuning of sparse-mixture-of-experts language models on unequal machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(runs.app)
app.add_typer(federation.app)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fedflame {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated fine-tuning of sparse-mixture-of-experts language models on unequal machines."""
