"""One run from configuration to report: assemble the federation, go through the rounds, write it down."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fedflame import __version__
from fedflame.atomic_file import write_atomically
from fedflame.base_model import load_base_model, model_config_path
from fedflame.budgets import ModelShape, read_model_shape, training_flops_per_token
from fedflame.commands.tables import cost_table, partition_table, result_table
from fedflame.config import RunConfig
from fedflame.cost import RunCost, run_cost, target_modules
from fedflame.data.batches import pad_token
from fedflame.data.federation import (
    EncodedFederation,
    Federation,
    describe,
    encode_federation,
    load_federation,
)
from fedflame.errors import UserError
from fedflame.evaluation import HeldOut
from fedflame.export import export_adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.report import write_report
from fedflame.report.records import read_run
from fedflame.server.checkpoint import FILE_NAME as CHECKPOINT_FILE
from fedflame.server.checkpoint import Checkpoint, read_checkpoint
from fedflame.server.rounds import LocalClients, Server, run_rounds
from fedflame.strategies import Strategy, build_strategy
from fedflame.strategies.base import ClientProfile
from fedflame.tracking import MetricsFile, Reporter, reporter

SKIPPED_ROWS_SHOWN = 5
Existing = Literal["refuse", "resume", "overwrite"]


@dataclass(frozen=True)
class Workbench:
    """Everything loaded for a configuration: model, data, method, costs."""

    config: RunConfig
    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    federation: Federation
    encoded: EncodedFederation
    strategy: Strategy
    cost: RunCost

    @property
    def held_out(self) -> HeldOut:
        config = self.config
        return HeldOut(
            self.federation.held_out,
            self.encoded.held_out,
            self.tokenizer,
            config.data.max_length,
            config.evaluation.batch_size,
            config.evaluation.max_new_tokens,
        )

    @property
    def profiles(self) -> list[ClientProfile]:
        parts = zip(self.config.tiers(), self.federation.parts, strict=True)
        return [ClientProfile(client, k, len(part)) for client, (k, part) in enumerate(parts)]

    @property
    def tiers(self) -> list[int]:
        """The distinct k of the clients, largest first."""
        return sorted(set(self.config.tiers()), reverse=True)


def execute(config: RunConfig, config_text: str, existing: Existing, console: Console) -> Path:
    """Run the configuration to its end and return the run folder.

    Args:
        config: the resolved configuration.
        config_text: the TOML file as given, kept beside the results; empty for the defaults.
        existing: what to do with a run folder that is there.
        console: where progress and tables go.

    Raises:
        UserError: whatever the user can mend, with the run folder as it was before where the run
            could not start, and with the last checkpoint where it could.
    """
    run = Path(config.output_dir)
    _check_run_folder(run, config, existing)
    bench = assemble(config, console, _dtype(run, config, existing))
    if existing == "overwrite" and run.exists():
        shutil.rmtree(run)
    checkpoint = _starting_point(run, bench)
    if checkpoint.round == 0 and checkpoint.metrics_bytes == 0:
        _write_run_files(run, bench, config_text)
    steps = config.training.max_steps * max(
        1, round(config.server.fraction_train * config.clients.num_clients)
    )
    remaining = (config.server.num_server_rounds - checkpoint.round) * steps
    metrics = MetricsFile(run / "metrics.jsonl", checkpoint.metrics_bytes)
    try:
        with reporter(console, remaining) as progress:
            checkpoint = run_rounds(_server(bench, run, metrics, progress), checkpoint)
    finally:
        metrics.close()
        write_report(run)
    _export(run, bench, checkpoint, console)
    console.print(result_table(read_run(run)))
    return run


def assemble(config: RunConfig, console: Console, dtype: str | None = None) -> Workbench:
    """Load and check everything that a run or an evaluation needs, and say what was found.

    Args:
        config: what to load.
        console: where tables go.
        dtype: of the frozen base; None for `model.dtype`.

    Raises:
        UserError: see `load_base_model`, `load_federation`, `AdaptedModel` and `run_cost`.
    """
    federation = load_federation(config)
    _say_skipped(federation, console)
    model, tokenizer = load_base_model(config.model.model_name_or_path, dtype or config.model.dtype)
    adapted = AdaptedModel(model, config.adapter.r, config.adapter.lora_alpha, target_modules(config))
    shape = read_model_shape(model_config_path(config.model.model_name_or_path))
    encoded = encode_federation(federation, tokenizer, config.data.max_length)
    base_dtype: Any = str(model.dtype).removeprefix("torch.")
    cost = run_cost(config, shape, base_dtype, encoded.mean_length, encoded.labelled_share)
    strategy = build_strategy(config.strategy, config.tiers(), adapted.num_experts_per_tok)
    bench = Workbench(config, adapted, tokenizer, shape, federation, encoded, strategy, cost)
    console.print(
        f"model {config.model.model_name_or_path} in {base_dtype}, {torch.get_num_threads()} threads"
    )
    console.print(partition_table(describe(federation, config.tiers()), encoded.truncated))
    console.print(cost_table(cost))
    return bench


def _export(run: Path, bench: Workbench, checkpoint: Checkpoint, console: Console) -> None:
    """Write the run's adapter folder, or say why this model family can only be merged."""
    try:
        export_adapter(
            checkpoint.state,
            bench.config,
            bench.adapted.model,
            run / "adapter",
            checkpoint.round,
            overwrite=True,
        )
    except UserError as error:
        console.print(f"no adapter folder: {error}", markup=False, soft_wrap=True)


def _check_run_folder(run: Path, config: RunConfig, existing: Existing) -> None:
    """Refuse a folder that must not be touched, and a resumption with another configuration."""
    if existing == "resume":
        saved = saved_config(run)
        if differing := _differing_keys(saved.model_dump(), config.model_dump()):
            raise UserError(
                f"{run}: --resume needs the configuration it was started with; {differing[0]} differs "
                f"(config.json in the run folder has it)"
            )
    elif run.exists() and not (run.is_dir() and not any(run.iterdir())):
        if existing == "refuse":
            raise UserError(f"{run}: exists already; --resume goes on with it, --overwrite starts anew")
        saved_config(run)


def saved_config(run: Path) -> RunConfig:
    """The configuration in a run folder; UserError for a folder that is none, which nothing may remove."""
    try:
        return RunConfig.model_validate_json((run / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a run folder (no config.json of a run); it is left as it is") from error


def _dtype(run: Path, config: RunConfig, existing: Existing) -> str:
    """The base's dtype: on resumption the one it began with, lest a new probe change the numbers."""
    path = run / "environment.json"
    if existing == "resume" and path.exists():
        return str(json.loads(path.read_text())["dtype"])
    return config.model.dtype


def _differing_keys(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name, value in one.items():
        if isinstance(value, dict):
            keys += _differing_keys(value, other[name], f"{prefix}{name}.")
        elif value != other[name]:
            keys.append(prefix + name)
    return keys


def _starting_point(run: Path, bench: Workbench) -> Checkpoint:
    """The run's checkpoint, or round 0 where none was written yet."""
    if (run / CHECKPOINT_FILE).exists():
        return read_checkpoint(run)
    adapter = bench.adapted.initial_adapter(bench.config.seed)
    return Checkpoint(0, 0, bench.strategy.initialize(adapter, bench.tiers, len(bench.adapted.layers)))


def _server(bench: Workbench, run: Path, metrics: MetricsFile, progress: Reporter) -> Server:
    clients = LocalClients(bench.adapted, bench.encoded.clients, pad_token(bench.tokenizer))
    return Server(
        config=bench.config,
        run=run,
        strategy=bench.strategy,
        clients=bench.profiles,
        tiers=bench.tiers,
        training_flops=partial(_training_flops, bench),
        train_client=clients.train,
        adapted=bench.adapted,
        held_out=bench.held_out,
        metrics=metrics,
        reporter=progress,
    )


def _training_flops(bench: Workbench, k: int) -> float:
    config, cost = bench.config, bench.cost
    targets = target_modules(config)
    return training_flops_per_token(
        bench.shape, k, config.adapter.r, targets, cost.sequence_length, cost.labelled_share
    ).total


def _write_run_files(run: Path, bench: Workbench, config_text: str) -> None:
    """What is known before the first round; config.json first, since it makes the folder a run folder."""
    _write_json(run / "config.json", bench.config.model_dump())
    write_atomically(run / "config.toml", config_text.encode())
    _write_json(run / "environment.json", _environment(bench))
    _write_json(run / "partition.json", _partition(bench))
    _write_json(run / "plan.json", bench.cost.to_json())


def _partition(bench: Workbench) -> dict[str, Any]:
    data, federation = bench.config.data, bench.federation
    return {
        "partition": data.partition,
        "alpha": data.alpha if data.partition == "dirichlet" else None,
        "rows": len(federation.training),
        "categories": federation.categories,
        "clients": describe(federation, bench.config.tiers()),
        "held_out_rows": len(federation.held_out),
        "truncated_rows": bench.encoded.truncated,
        "skipped_rows": len(federation.skipped),
    }


def _environment(bench: Workbench) -> dict[str, Any]:
    packages = ("torch", "transformers", "peft", "datasets", "numpy")
    return {package: version(package) for package in packages} | {
        "fedflame": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(bench.adapted.model.dtype).removeprefix("torch."),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def _say_skipped(federation: Federation, console: Console) -> None:
    for row in federation.skipped[:SKIPPED_ROWS_SHOWN]:
        console.print(f"skipped {row.where}: {row.reason}", markup=False, highlight=False)
    if federation.skipped:
        console.print(f"{len(federation.skipped)} rows skipped, {len(federation.training)} rows to train on")
