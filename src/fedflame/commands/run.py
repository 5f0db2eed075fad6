"""One run from configuration to report: assemble the federation, go through the rounds, write it down."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from fedflame.atomic_file import write_atomically
from fedflame.base_model import DtypeChoice, choose_dtype, model_config_path
from fedflame.budgets import ModelShape, read_model_shape
from fedflame.choices import Dtype
from fedflame.commands.adapter_folder import check_start, initial_state, write_run_adapter
from fedflame.commands.environment import environment
from fedflame.commands.sites import Sites, check_sites, site_clients
from fedflame.commands.tables import cost_table, partition_table, result_table
from fedflame.config import RunConfig
from fedflame.cost import RunCost, run_cost, training_flops
from fedflame.data.batches import pad_token
from fedflame.data.federation import (
    EncodedFederation,
    Federation,
    describe,
    encode_federation,
    load_federation,
)
from fedflame.error_feedback import Residuals
from fedflame.errors import UserError
from fedflame.evaluation import HeldOut
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.report import write_report
from fedflame.report.records import read_run
from fedflame.server.checkpoint import FILE_NAME as CHECKPOINT_FILE
from fedflame.server.checkpoint import Checkpoint, read_checkpoint
from fedflame.server.local_clients import Clients, LocalClients, load_adapted_model
from fedflame.server.rounds import Server, run_rounds, sample_clients
from fedflame.server.worker_clients import WorkerClients, WorkerSetup
from fedflame.settings import validated
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
        ranks = self.config.ranks(self.adapted.num_experts_per_tok)
        budgets = zip(self.config.tiers(), ranks, self.federation.parts, strict=True)
        return [ClientProfile(client, k, r, len(part)) for client, (k, r, part) in enumerate(budgets)]


def execute(
    config: RunConfig,
    config_text: str,
    existing: Existing,
    console: Console,
    workers: int = 1,
    sites: Sites | None = None,
) -> Path:
    """Run the configuration to its end and return the run folder.

    Args:
        config: the resolved configuration.
        config_text: the TOML file as given, kept beside the results; empty for the defaults.
        existing: what to do with a run folder that is there.
        console: where progress and tables go.
        workers: processes that train clients; with 1 this process does. The adapter's bytes depend on
            the threads of each process, not on their number.
        sites: the clients, where they are sites behind an engine; None for clients of this machine.

    Raises:
        UserError: whatever the user can mend, with the run folder as it was before where the run
            could not start, and with the last checkpoint where it could.
    """
    run = Path(config.output_dir)
    _check_run_folder(run, config, existing)
    if sites is not None:
        check_sites(config, sites)
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    if existing != "resume":
        check_start(config, console)
    names = sites.hub.site_names() if sites is not None else ()
    bench = assemble(config, console, saved_dtype(run) if existing == "resume" else None, names)
    checkpoint = _starting_point(run, bench, existing == "resume", sites is not None)
    if existing == "overwrite" and run.exists():
        _remove(run)
    if checkpoint.round == 0 and checkpoint.metrics_bytes == 0:
        _write_run_files(run, bench, config_text)
    remaining = _remaining_steps(bench, checkpoint.round)
    metrics = MetricsFile(run / "metrics.jsonl", checkpoint.metrics_bytes)
    try:
        with (
            reporter(console, remaining) as progress,
            _clients(bench, run, workers, sites, progress) as clients,
        ):
            checkpoint = run_rounds(_server(bench, run, clients, metrics, progress), checkpoint)
    except KeyboardInterrupt as error:
        hint = f"the same command with --resume goes on after round {_rounds_kept(run)}"
        raise KeyboardInterrupt(hint) from error
    finally:
        metrics.close()
        with suppress(UserError):  # a full disk has been reported already
            write_report(run)
    write_run_adapter(checkpoint, config, bench.adapted.model, run, console)
    console.print(result_table(read_run(run)))
    return run


def assemble(
    config: RunConfig, console: Console, dtype: Dtype | None = None, sites: Sequence[str] = ()
) -> Workbench:
    """Load and check everything that a run or an evaluation needs, and say what was found.

    Args:
        config: what to load.
        console: where tables go.
        dtype: of the frozen base; None for `model.dtype`.
        sites: names of the clients, where these have rows of their own.

    Raises:
        UserError: see `load_base_model`, `load_federation`, `AdaptedModel` and `run_cost`.
    """
    federation = load_federation(config)
    _say_skipped(federation, console)
    shape = read_model_shape(model_config_path(config.model.model_name_or_path))
    choice = DtypeChoice(dtype, "as before") if dtype else choose_dtype(config.model.dtype, shape)
    adapted, tokenizer = load_adapted_model(config, choice.name)
    _require_context(config, adapted.model.config)
    strategy = build_strategy(config, adapted.num_experts_per_tok)
    encoded = encode_federation(federation, tokenizer, config.data.max_length)
    cost = run_cost(config, shape, choice.name, encoded.mean_length, encoded.labelled_share)
    bench = Workbench(config, adapted, tokenizer, shape, federation, encoded, strategy, cost)
    threads = torch.get_num_threads()
    console.print(
        f"model {config.model.model_name_or_path} in {choice.name} ({choice.reason}), "
        f"{threads} thread{'s' * (threads > 1)}"
    )
    clients = describe(federation, config.tiers())
    console.print(partition_table(clients, cost.clients, encoded.truncated, sites))
    console.print(cost_table(cost))
    return bench


def _require_context(config: RunConfig, model_config: Any) -> None:
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and config.data.max_length > context:
        raise UserError(
            f"data.max_length = {config.data.max_length}: the model's context is {context} tokens "
            "(max_position_embeddings)"
        )
    if config.evaluation.max_new_tokens >= config.data.max_length:
        raise UserError(
            f"evaluation.max_new_tokens = {config.evaluation.max_new_tokens}: must be below "
            f"data.max_length = {config.data.max_length}, which prompt and answer share"
        )


def _check_run_folder(run: Path, config: RunConfig, existing: Existing) -> None:
    """Refuse a folder that must not be touched, and a resumption with another configuration."""
    if existing == "resume":
        saved = saved_config(run)
        if differing := _differing_keys(saved.model_dump(), config.model_dump(exclude={"output_dir"})):
            raise UserError(
                f"{run}: --resume needs the configuration it was started with; {differing[0]} differs "
                f"(config.json in the run folder has it)"
            )
    elif run.exists() and not (run.is_dir() and not any(run.iterdir())):
        if existing == "refuse":
            raise UserError(f"{run}: exists already; --resume goes on with it, --overwrite starts anew")
        saved_config(run)


def saved_config(run: Path) -> RunConfig:
    """The configuration in a run folder; UserError for a folder that is none, which nothing may remove.

    A run of another version of fedflame may have keys or values that this one does not.
    """
    path = run / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a run folder (no config.json of a run); it is left as it is") from error
    return validated(RunConfig, values, f"{path}, which is left as it is")


def saved_dtype(run: Path) -> Dtype | None:
    """The base's dtype in a run folder: a new probe of the machine must not change the numbers."""
    path = run / "environment.json"
    if not path.exists():
        return None
    dtype: Dtype = json.loads(path.read_text())["dtype"]
    return dtype


def _differing_keys(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for name in other:
        value = one[name]
        if isinstance(value, dict):
            keys += _differing_keys(value, other[name], f"{prefix}{name}.")
        elif value != other[name]:
            keys.append(prefix + name)
    return keys


def _starting_point(run: Path, bench: Workbench, resumed: bool, at_sites: bool) -> Checkpoint:
    """The run's checkpoint, or round 0 where there is none to go on from."""
    if resumed and (run / CHECKPOINT_FILE).exists():
        _require_same_data(run, bench, at_sites)
        return read_checkpoint(run)
    return Checkpoint(0, 0, initial_state(bench.config, bench.adapted, bench.strategy, bench.profiles))


def _require_same_data(run: Path, bench: Workbench, at_sites: bool) -> None:
    saved, now = json.loads((run / "partition.json").read_text()), _partition(bench)
    # What sites hold is their own; of the hub's data only the held-out rows count.
    compared = ("data_digest", "held_out_rows") if at_sites else now.keys()
    if any(saved.get(key) != now[key] for key in compared):
        raise UserError(
            f"{run}: --resume needs the data it was started with; {bench.config.data.dataset_name} now gives "
            "another partition (partition.json in the run folder has it)"
        )


def _remaining_steps(bench: Workbench, last_round: int) -> int:
    """Optimizer steps of all clients that the rounds after `last_round` will sample."""
    config, k = bench.config, bench.adapted.num_experts_per_tok
    steps = {(cost.client, cost.trained_experts): cost.steps for cost in bench.cost.clients}
    return sum(
        steps[profile.client, config.trained_experts(k, number)[profile.client]]
        for number in range(last_round + 1, config.server.num_server_rounds + 1)
        for profile in sample_clients(bench.profiles, config.clients_per_round(), config.seed, number)
    )


def _rounds_kept(run: Path) -> int:
    return read_checkpoint(run).round if (run / CHECKPOINT_FILE).exists() else 0


def _remove(run: Path) -> None:
    """Delete a run folder; renamed first, so that a kill on the way does not leave half of one."""
    aside = run.with_name(run.name + ".removed")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        run.rename(aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise UserError(f"{run}: cannot be replaced: {error.strerror}") from error


@contextmanager
def _clients(
    bench: Workbench, run: Path, workers: int, sites: Sites | None, progress: Reporter
) -> Iterator[Clients]:
    if sites is not None:
        adapted = bench.adapted
        with site_clients(
            sites, bench.config, adapted.dtype, adapted.num_experts_per_tok, run, progress.message
        ) as at_sites:
            yield at_sites
        return
    rows, pad_token_id = bench.encoded.clients, pad_token(bench.tokenizer)
    residuals = Residuals(run / "residuals")
    if workers == 1:
        yield LocalClients(bench.adapted, rows, pad_token_id, residuals)
        return
    setup = WorkerSetup(
        bench.config, bench.adapted.dtype, rows, pad_token_id, residuals, torch.get_num_threads()
    )
    with WorkerClients(setup, workers) as clients:
        yield clients


def _server(
    bench: Workbench, run: Path, clients: Clients, metrics: MetricsFile, progress: Reporter
) -> Server:
    return Server(
        config=bench.config,
        run=run,
        strategy=bench.strategy,
        profiles=[
            replace(profile, num_examples=rows)
            for profile, rows in zip(bench.profiles, clients.num_examples(), strict=True)
        ],
        tiers=bench.config.evaluated_experts(bench.adapted.num_experts_per_tok),
        deployments=bench.config.cut_deployments(bench.adapted.num_experts_per_tok),
        training_flops=partial(_training_flops, bench),
        clients=clients,
        adapted=bench.adapted,
        held_out=bench.held_out,
        metrics=metrics,
        reporter=progress,
    )


def _training_flops(bench: Workbench, k: int, rank: int) -> float:
    cost = bench.cost
    return training_flops(bench.config, bench.shape, k, rank, cost.sequence_length, cost.labelled_share)


def _write_run_files(run: Path, bench: Workbench, config_text: str) -> None:
    """What is known before the first round; config.json first, since it makes the folder a run folder."""
    _write_json(run / "config.json", bench.config.model_dump())
    write_atomically(run / "config.toml", config_text.encode())
    _write_json(run / "environment.json", environment() | {"dtype": bench.adapted.dtype})
    _write_json(run / "partition.json", _partition(bench))
    _write_json(run / "plan.json", bench.cost.to_json())
    skipped = [{"where": row.where, "reason": row.reason} for row in bench.federation.skipped]
    write_atomically(run / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped).encode())


def _partition(bench: Workbench) -> dict[str, Any]:
    data, federation = bench.config.data, bench.federation
    return {
        "data_digest": federation.digest,
        "partition": data.partition,
        "alpha": data.alpha if data.partition == "dirichlet" else None,
        "rows": len(federation.training),
        "categories": federation.categories,
        "clients": describe(federation, bench.config.tiers()),
        "held_out_rows": len(federation.held_out),
        "truncated_rows": bench.encoded.truncated,
        "skipped_rows": len(federation.skipped),
    }


def _write_json(path: Path, value: object) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def _say_skipped(federation: Federation, console: Console) -> None:
    for row in federation.skipped[:SKIPPED_ROWS_SHOWN]:
        console.print(f"skipped {row.where}: {row.reason}", markup=False, highlight=False)
    if federation.skipped:
        console.print(f"{len(federation.skipped)} rows skipped (all in skipped.jsonl of the run folder)")
