"""The commands of one experiment and of comparisons. Each imports its work when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from fedflame.cli.options import (
    CELL_FAILED,
    AsJson,
    ConfigFile,
    Data,
    Debug,
    Device,
    Model,
    Overrides,
    Scored,
    config_of,
    flags,
    user_errors,
)
from fedflame.config.sections import SKILLS
from fedflame.errors import UserError
from fedflame.experiment.run_folder import Existing

app = typer.Typer()


@app.command()
def run(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    device: Device = None,
    output_dir: Annotated[str | None, typer.Option(help="The run folder (output_dir).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    resume_from: Annotated[
        int | None,
        typer.Option(min=0, metavar="ROUND", help="Go on after this round, whose checkpoint is kept."),
    ] = None,
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
    with user_errors(debug):
        going_on = resume or resume_from is not None
        if going_on and overwrite:
            raise UserError("--resume and --overwrite exclude each other; give one")
        if (engine is None) != (hub is None) or (engine and workers > 1):
            raise UserError("--engine and --hub go together, and without --workers: the sites train")
        config = config_of(config_file, overrides, data, model, device, output_dir)
        sites = None
        if engine is not None and hub is not None:
            from fedflame.engines.hub import load_hub
            from fedflame.experiment.sites import open_sites

            sites = open_sites(engine, load_hub(hub))
        from fedflame.experiment.prepare import prepare

        existing: Existing = "resume" if going_on else "overwrite" if overwrite else "refuse"
        prepared = prepare(config, existing, sites, resume_from=resume_from)
        from fedflame.commands.run import print_run  # from here on with torch

        text = config_file.read_text(encoding="utf-8", errors="replace") if config_file else ""
        print_run(prepared, text, Console(), workers)


@app.command("plan")
def print_plan_of(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    device: Device = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="FLOPs for rows of so many tokens, head at each, whatever the data."),
    ] = None,
    show_row: Annotated[
        bool, typer.Option("--show-row", help="Show the first row as it is trained on, and what has loss.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print partition, tiers, FLOPs, bytes and memory of a run without loading weights."""
    with user_errors(debug):
        config = config_of(config_file, overrides, data, model, device)
        from fedflame.commands.plan import print_plan
        from fedflame.experiment.api import plan

        print_plan(plan(config, sequence_length=sequence_length), as_json, show_row, Console())


@app.command()
def audit(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    device: Device = None,
    canaries: Annotated[
        int, typer.Option(min=20, max=100_000, help="Random rows; about half are trained on.")
    ] = 400,
    client: Annotated[int, typer.Option(min=0, help="The client among whose rows they are.")] = 0,
    debug: Debug = False,
) -> None:
    """Train with random rows at a client, and say what the hub could tell of them."""
    with user_errors(debug):
        config = config_of(config_file, overrides, data, model, device)
        from fedflame.commands.audit import print_audit

        print_audit(config, canaries, client, Console())


@app.command()
def compare(
    grid_file: Annotated[Path, typer.Argument(help="TOML grid of methods, seeds and settings.")],
    overrides: Overrides = None,
    data: Data = None,
    model: Model = None,
    device: Device = None,
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
    with user_errors(debug):
        from fedflame.commands.compare import list_cells, print_comparison
        from fedflame.compare.grid import read_grid

        grid = read_grid(grid_file, flags(overrides, data, model, device), output_dir, baseline)
        if dry_run:
            list_cells(grid, console)
            return
        if not print_comparison(grid, workers, console):
            raise typer.Exit(CELL_FAILED)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, an adapter folder or a base model.")],
    active_experts: Annotated[str | None, typer.Option(help="k to evaluate at, such as 8,4,2,1.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, comma-separated, instead of held-out rows."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a folder with task files of your own.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="With --tasks: examples before each row; default the task's.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="With --tasks: rows of each task, or below 1 their share.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="With --tasks: rows become turns of a chat.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="With --tasks: rows at a time.")] = None,
    overrides: Overrides = None,
    data: Scored = None,
    model: Model = None,
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a run, an adapter or a base model on held-out rows or in tasks, by k."""
    with user_errors(debug):
        given = flags(overrides, data if data == SKILLS else None, model, device)
        if data not in (None, SKILLS):
            given += [f"evaluation.dataset_name={data}", "evaluation.split=test"]
        asked = include_path, num_fewshot, limit, apply_chat_template or None, batch_size
        if tasks is None:
            if any(value is not None for value in asked):
                raise UserError(
                    "--include-path, --num-fewshot, --limit, --apply-chat-template, --batch-size need --tasks"
                )
            from fedflame.commands.evaluate import print_scores

            print_scores(source, active_experts, given, as_json, Console())
            return
        from fedflame.commands.evaluate import print_task_scores
        from fedflame.experiment.tasks import TaskOptions

        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if not names:
            raise UserError("--tasks: names no task")
        options = TaskOptions(names, include_path, num_fewshot, limit, apply_chat_template, batch_size or 8)
        print_task_scores(source, options, active_experts, given, as_json, Console())


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
    with user_errors(debug):
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
    with user_errors(debug):
        from fedflame.report import write_report

        Console().print(f"report: {write_report(run_folder)}", soft_wrap=True)


@app.command()
def watch(
    place: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or a site's file or its folder.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on this machine's loopback interface; 0: a free one.")
    ] = 0,
    debug: Debug = False,
) -> None:
    """Show a run in progress, or a site's trainer, as a live page for a browser of this machine."""
    with user_errors(debug):
        from fedflame.commands.watch import watch as serve

        serve(place, port, Console())


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="A stock checkpoint instead of an adapter.")] = False,
    active_experts: Annotated[
        int | None,
        typer.Option(min=1, help="With --merge or --gguf: the k that it is for; default the model's own."),
    ] = None,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="A GGUF LoRA for llama.cpp instead of an adapter for PEFT.")
    ] = False,
    layout: Annotated[
        Literal["per-expert", "fused"] | None,
        typer.Option(
            help="Of the adapter: PEFT's target_modules or target_parameters; default per-expert where PEFT "
            "reads it for the model family, else fused."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Load the folder with transformers and PEFT: it must act as the run."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    push_to_hub: Annotated[
        bool,
        typer.Option("--push-to-hub", help="Push the folder, with the token of HF_TOKEN or `hf auth login`."),
    ] = False,
    hub_model_id: Annotated[
        str, typer.Option(help="USER/NAME, where the folder is to be on the hub; the card says it.")
    ] = "",
    hub_private_repo: Annotated[
        bool, typer.Option("--hub-private-repo", help="Make a new repository private.")
    ] = False,
    license: Annotated[
        str, typer.Option(help="For the card: the hub's id of a license, such as apache-2.0, or `other`.")
    ] = "",
    license_name: Annotated[str, typer.Option(help="For the card: its name, with `--license other`.")] = "",
    license_link: Annotated[str, typer.Option(help="For the card: where its text is.")] = "",
    debug: Debug = False,
) -> None:
    """Write a run's adapter for PEFT or llama.cpp, or merge it into a stock checkpoint; push it."""
    with user_errors(debug):
        from fedflame.commands.export import print_export
        from fedflame.experiment.export import ExportOptions

        options = ExportOptions(
            merge=merge,
            active_experts=active_experts,
            layout=layout,
            overwrite=overwrite,
            check=check,
            gguf=gguf,
            push_to_hub=push_to_hub,
            hub_model_id=hub_model_id,
            hub_private_repo=hub_private_repo,
            license=license,
            license_name=license_name,
            license_link=license_link,
        )
        print_export(run_folder, to, options, Console())
