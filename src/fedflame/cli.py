"""The `fedflame` command. Arguments are parsed first; torch is imported by the work itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fedflame.config import RunConfig, load_config
from fedflame.errors import USER_ERROR, UserError
from fedflame.settings import validated

INTERRUPTED = 130
CELL_FAILED = 1
CHECK_FAILED = 1

app = typer.Typer(
    help="Federated fine-tuning of sparse-mixture-of-experts language models on unequal machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

hub_app = typer.Typer(
    help="Set up and check the hub of a federation over NVIDIA FLARE.", no_args_is_help=True
)
site_app = typer.Typer(help="Set up and check a site that takes part.", no_args_is_help=True)
app.add_typer(hub_app, name="hub")
app.add_typer(site_app, name="site")

ConfigFile = Annotated[
    Path | None, typer.Argument(help="TOML file; without it, the embedded model and data.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, over the file; may be repeated.")
]
Data = Annotated[
    str | None, typer.Option("--data", help="`skills`, a data file or a hub id (data.dataset_name).")
]
Model = Annotated[
    str | None, typer.Option("--model", help="`olmoe-tiny`, a folder or a hub id (model.model_name_or_path).")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def run(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    output_dir: Annotated[str | None, typer.Option(help="The run folder (output_dir).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the run folder.")
    ] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that train clients side by side, with the same result.")
    ] = 1,
    engine: Annotated[
        Literal["nvflare", "flower"] | None, typer.Option(help="Train at sites behind this engine, not here.")
    ] = None,
    hub: Annotated[Path | None, typer.Option(help="TOML file of the hub: its sites and the engine.")] = None,
    debug: Debug = False,
) -> None:
    """Fine-tune one model across unequal clients; leaves adapter, metrics and report in a run folder."""
    console = Console()
    with _user_errors(debug):
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one")
        if (engine is None) != (hub is None) or (engine and workers > 1):
            raise UserError("--engine and --hub go together, and without --workers: the sites train")
        config = _config(config_file, overrides, data, model, output_dir)
        text = config_file.read_text(encoding="utf-8") if config_file else ""
        _quiet_libraries()
        from fedflame.commands.run import execute

        existing: Literal["refuse", "resume", "overwrite"] = (
            "resume" if resume else "overwrite" if overwrite else "refuse"
        )
        sites = None
        if engine is not None and hub is not None:
            from fedflame.commands.sites import open_sites
            from fedflame.engines.hub import load_hub

            sites = open_sites(engine, load_hub(hub))
        folder = execute(config, text, existing, console, workers, sites)
        written = [folder / name for name in ("report.html", "adapter") if (folder / name).exists()]
        console.print("\n".join(f"{path.stem}: {path}" for path in written), soft_wrap=True)


@app.command()
def plan(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="FLOPs for rows of so many tokens, head at each, whatever the data."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print partition, tiers, FLOPs, bytes and memory of a run without loading weights."""
    with _user_errors(debug):
        config = _config(config_file, overrides, data, model, None)
        _quiet_libraries()
        from fedflame.commands.plan import print_plan

        print_plan(config, sequence_length, as_json, Console())


@app.command()
def compare(
    grid_file: Annotated[Path, typer.Argument(help="TOML grid of methods, seeds and settings.")],
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the comparison (output_dir).")] = None,
    baseline: Annotated[str | None, typer.Option(help="Method that differences are to (baseline).")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Cells that run side by side, one thread each.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and which are finished.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run what is missing of a grid, a process per cell; leaves tables, curves and differences."""
    console = Console()
    with _user_errors(debug):
        from fedflame.commands.compare import list_cells, run_comparison
        from fedflame.compare.grid import read_grid

        grid = read_grid(grid_file, _flags(overrides, data, model, None), output_dir, baseline)
        if dry_run:
            list_cells(grid, console)
            return
        _quiet_libraries()
        if not run_comparison(grid, workers, console):
            raise typer.Exit(CELL_FAILED)


@app.command()
def split(
    output_dir: Annotated[Path, typer.Option(help="Folder for the files; empty or not there yet.")],
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    debug: Debug = False,
) -> None:
    """Write each client's rows into a file of its own, for sites that train the same experiment."""
    console = Console()
    with _user_errors(debug):
        config = _config(config_file, overrides, data, model, None)
        _quiet_libraries()
        from fedflame.commands.split import split as write_parts

        write_parts(config, output_dir, console)


@hub_app.command("init")
def hub_init(
    folder: Annotated[Path, typer.Argument(help="Folder for kits and the hub's file.")],
    sites: Annotated[str, typer.Option(help="Names of the sites, comma-separated; call again to add some.")],
    host: Annotated[str, typer.Option(help="The hub's name as the sites resolve it.")],
    admin: Annotated[str, typer.Option(help="Mail address of who may start runs.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The one TCP port of the hub.")] = 8002,
    debug: Debug = False,
) -> None:
    """Make certificates and kits for a hub and its sites, and say what to do with them."""
    with _user_errors(debug):
        _quiet_libraries()
        from fedflame.commands.hub import init_hub
        from fedflame.engines.hub import Hub
        from fedflame.engines.nvflare.provision import Federation

        names = validated(Hub, {"sites": sites}, "--sites").site_names()
        init_hub(folder, Federation(host, port, names, admin), Console())


@hub_app.command("check")
def hub_check(
    hub: Annotated[Path, typer.Argument(help="The hub's file.")],
    config_file: ConfigFile = None,
    debug: Debug = False,
) -> None:
    """Test certificate, port, clock, disk, server, sites and model, and say what to mend."""
    with _user_errors(debug):
        _quiet_libraries()
        from fedflame.commands.hub import check_hub
        from fedflame.engines.hub import load_hub

        config = load_config(config_file, []) if config_file else None
        if not check_hub(load_hub(hub), config, Console()):
            raise typer.Exit(CHECK_FAILED)


@site_app.command("init")
def site_init(
    folder: Annotated[Path, typer.Argument(help="Folder for the site's file and the trainer's state.")],
    data: Annotated[str, typer.Option(help="The rows to train on: a data file or a hub id.")],
    active_experts: Annotated[int, typer.Option(min=1, help="Experts per token that this machine affords.")],
    allow_model: Annotated[
        list[str],
        typer.Option(help="A base model that may be trained: NAME or NAME=FOLDER; may be repeated."),
    ],
    kit: Annotated[
        Path | None, typer.Option(help="Over NVIDIA FLARE: the kit that the hub's administrator sent.")
    ] = None,
    superlink: Annotated[str, typer.Option(help="Over Flower: host and port of the SuperLink.")] = "",
    root_certificates: Annotated[
        Path, typer.Option(help="Over Flower: PEM file of who signed the SuperLink's certificate.")
    ] = Path("ca.crt"),
    name: Annotated[str, typer.Option(help="Over Flower: what the hub's file calls this site.")] = "",
    debug: Debug = False,
) -> None:
    """Write the site's file and its services, and say what to do with them."""
    with _user_errors(debug):
        _quiet_libraries()
        from fedflame.commands.site import NewSite, flower_engine, init_site, nvflare_engine, parse_models

        new = NewSite(data, active_experts, parse_models(allow_model))
        if kit is not None and not superlink:
            engine = nvflare_engine(kit)
        elif superlink and name and kit is None:
            engine = flower_engine(name, folder, superlink, root_certificates)
        else:
            raise UserError("site init needs either --kit (NVIDIA FLARE) or --superlink and --name (Flower)")
        init_site(folder, new, engine, Console())


@site_app.command("check")
def site_check(site: Annotated[Path, typer.Argument(help="The site's file.")], debug: Debug = False) -> None:
    """Test certificate, port, clock, disk, data, models and trainer, and say what to mend."""
    with _user_errors(debug):
        _quiet_libraries()
        from fedflame.commands.site import check_site
        from fedflame.trainer.site import load_site

        if not check_site(load_site(site), Console()):
            raise typer.Exit(CHECK_FAILED)


@app.command()
def trainer(
    site: Annotated[Path, typer.Option(help="TOML file of this site: its data, its k, what it allows.")],
    once: Annotated[
        bool, typer.Option("--once", help="Do not start again after a crash; for systemd and the like.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve this site's rows and k to the federation's engine, until interrupted."""
    console = Console()
    with _user_errors(debug):
        _quiet_libraries()
        from fedflame.commands.trainer import run_trainer

        run_trainer(site, once, console)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, an adapter folder or a base model.")],
    active_experts: Annotated[str | None, typer.Option(help="k to evaluate at, such as 8,4,2,1.")] = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a run, an adapter or a base model on held-out rows at any k."""
    with _user_errors(debug):
        _quiet_libraries()
        from fedflame.commands.evaluate import print_scores

        given = _flags(overrides, data, model, None)
        print_scores(source, active_experts, given, as_json, Console())


@app.command()
def bench(
    tokens: Annotated[str, typer.Option(help="Tokens in a batch, comma-separated.")] = "512,2048",
    active_experts: Annotated[str, typer.Option(help="k to measure at, comma-separated.")] = "8,1",
    hidden_size: Annotated[int, typer.Option(min=1, help="H; the defaults are OLMoE-1B-7B's.")] = 2048,
    intermediate_size: Annotated[int, typer.Option(min=1, help="Width of one expert.")] = 1024,
    num_experts: Annotated[int, typer.Option(min=1, help="Experts of the block.")] = 64,
    r: Annotated[int, typer.Option("--r", min=1, help="LoRA rank.")] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    methods: Annotated[
        str, typer.Option(help="Of ours, ours-checkpointed, frozen, gemm, composed and peft.")
    ] = "ours,ours-checkpointed,frozen,gemm,composed,peft",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved; the median counts.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, on one thread, or cuda.")] = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time one MoE block with expert LoRA beside its bare products, the frozen block and PEFT."""
    with _user_errors(debug):
        _quiet_libraries()
        from fedflame.bench.block import Geometry
        from fedflame.commands.bench import print_bench

        geometry = Geometry(hidden_size, intermediate_size, num_experts, r, dtype, device)
        print_bench(geometry, tokens, active_experts, methods, repeats, as_json, Console())


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.")],
    debug: Debug = False,
) -> None:
    """Write report.html of a run folder anew."""
    with _user_errors(debug):
        from fedflame.report import write_report

        Console().print(f"report: {write_report(run_folder)}", soft_wrap=True)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="A stock checkpoint instead of an adapter.")] = False,
    active_experts: Annotated[
        int | None,
        typer.Option(min=1, help="With --merge: the k whose rescaler is folded in; default the model's."),
    ] = None,
    layout: Annotated[
        Literal["per-expert", "fused"] | None,
        typer.Option(
            help="Of the adapter: PEFT's target_modules or target_parameters; default per-expert where PEFT "
            "reads it for the model family, else fused."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    debug: Debug = False,
) -> None:
    """Write a run's adapter for PEFT, or merge it into a stock checkpoint."""
    with _user_errors(debug):
        if active_experts is not None and not merge:
            raise UserError("--active-experts needs --merge; an adapter serves every k")
        if layout is not None and merge:
            raise UserError("--layout is of an adapter; with --merge there is none")
        _quiet_libraries()
        from fedflame.commands.export import export_run

        console = Console()
        export_run(run_folder, to, merge, active_experts, layout, overwrite, console)
        console.print(f"written: {to}", soft_wrap=True)


def _config(
    config_file: Path | None,
    overrides: list[str] | None,
    data: str | None,
    model: str | None,
    output_dir: str | None,
) -> RunConfig:
    return load_config(config_file, _flags(overrides, data, model, output_dir))


def _flags(
    overrides: list[str] | None, data: str | None, model: str | None, output_dir: str | None
) -> list[str]:
    """The short flags as overrides; they come last and win."""
    short = {"data.dataset_name": data, "model.model_name_or_path": model, "output_dir": output_dir}
    return [*(overrides or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]


def _quiet_libraries() -> None:
    """No progress bars and no advice from libraries between our own lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler; it reads this when torch is loaded
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def _user_errors(debug: bool) -> Iterator[None]:
    """One line on stderr for what the user can mend."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        print(f"fedflame: {error}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from error
    except KeyboardInterrupt as error:
        print(f"fedflame: interrupted{str(error) and '; '}{error}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error
