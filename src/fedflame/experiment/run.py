"""One run from its configuration to its report: assemble, go through the rounds, write it down."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedflame.clients.answers import Clients
from fedflame.clients.local import LocalClients
from fedflame.clients.masked import MaskedClients
from fedflame.clients.workers import WorkerClients, WorkerSetup, worker_devices
from fedflame.cost.run_cost import training_flops
from fedflame.data.encoder import pad_token
from fedflame.errors import OutOfMemory, UserError
from fedflame.experiment.adapter_folder import Written, initial_state, starting_adapter, write_run_adapter
from fedflame.experiment.assemble import Experiment, assemble
from fedflame.experiment.environment import environment
from fedflame.experiment.method import build_strategy
from fedflame.experiment.prepare import Prepared
from fedflame.experiment.private_clients import require_private
from fedflame.experiment.resumption import RESIDUALS, Resumption, find_resumption, go_back
from fedflame.experiment.run_folder import (
    check_run_folder,
    device_change,
    empty_run,
    require_same_data,
    saved_dtype,
    write_run_files,
    writing,
)
from fedflame.experiment.site_clients import site_clients
from fedflame.experiment.sites import Sites
from fedflame.report import write_report
from fedflame.run_files.checkpoints import kept_rounds
from fedflame.run_files.lines import FILE_NAME as METRICS_FILE
from fedflame.server.checkpoint import Checkpoint, read_checkpoint
from fedflame.server.course import Course
from fedflame.server.metrics import MetricsFile, OnEvent
from fedflame.server.parts import Server
from fedflame.server.progress import Reporter, Silent
from fedflame.server.rounds import run_rounds
from fedflame.server.sampling import training_clients
from fedflame.strategies.base import ClientProfile, Strategy
from fedflame.trackers.process import Look, reporting
from fedflame.training.error_feedback import Residuals


@dataclass(frozen=True)
class Begun:
    """What is known when a run begins or goes on, before its first step."""

    experiment: Experiment
    starting_adapter: str
    """The adapter folder that it goes on from and what that was trained on, in words; empty for none."""
    remaining_batches: int
    """Of all clients that the rounds to come will sample; with epochs about as many."""
    sites: tuple[str, ...]
    """Names of the clients, where these are sites."""


Watch = Callable[[Begun], AbstractContextManager[Reporter]]
"""Told what begins; its reporter is told what happens until the block ends."""


def unwatched(begun: Begun) -> AbstractContextManager[Reporter]:
    """Nobody looks on."""
    return nullcontext(Silent())


def run_experiment(
    prepared: Prepared,
    *,
    config_text: str = "",
    workers: int = 1,
    strategy: Strategy | None = None,
    on_event: OnEvent | None = None,
    watch: Watch = unwatched,
) -> Written:
    """Run a prepared experiment to its end.

    Args:
        prepared: configuration, rows and sites, checked; see `prepare`.
        config_text: the TOML file as given, kept beside the results; empty for none.
        workers: processes that train clients, this one among them. The adapter's bytes depend on the threads
            of each process, not on their number.
        strategy: a method that a program hands over, instead of `strategy.name`.
        on_event: sees each object that goes into metrics.jsonl, as it happens.
        watch: shows what happens.

    Returns:
        The adapter folder that was written, or why there is none.

    Raises:
        UserError: whatever the user can mend, with the run folder as it was before where the run
            could not start, and with the last checkpoint where it could. `OutOfMemory` is one of these.
    """
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, usable_cores() // workers))
    run = Path(prepared.config.output_dir)
    with writing(run):
        check_run_folder(run, prepared.config, prepared.existing)  # nobody changes it from now on
        resumed = prepared.existing == "resume"
        to = find_resumption(run, prepared.config, prepared.resume_from) if resumed else None
        return _run(prepared, to, config_text, workers, strategy, on_event, watch)


def _run(
    prepared: Prepared,
    to: Resumption | None,
    config_text: str,
    workers: int,
    strategy: Strategy | None,
    on_event: OnEvent | None,
    watch: Watch,
) -> Written:
    """`run_experiment`, from the checkpoint `to` or from the start."""
    config, sites = prepared.config, prepared.sites
    run = Path(config.output_dir)
    start = "" if to else starting_adapter(config)
    method = strategy or build_strategy(config, prepared.shape.num_experts_per_tok)
    trained_here = 0 if sites is not None else workers
    experiment = assemble(config, prepared.federation, saved_dtype(run) if to else None, trained_here)
    if sites is None:
        require_private(experiment)
    moved = device_change(run, experiment.device) if to else ""
    checkpoint = _starting_point(run, experiment, method, to, sites is not None)
    if to:
        go_back(run, to)
    else:
        if prepared.existing == "overwrite":
            empty_run(run)
        write_run_files(run, experiment, config_text, environment())
    names = tuple(sites.hub.site_names()) if sites is not None else ()
    begun = Begun(experiment, start, _remaining_batches(experiment, checkpoint.round), names)
    name = config.run_name or run.resolve().name
    try:
        with (
            watch(begun) as reporter,
            reporting(config.report_to, run, name, reporter.message) as look,
            closing(_metrics(run, checkpoint, on_event, look)) as metrics,
            _clients(experiment, run, workers, sites, reporter) as clients,
        ):
            if moved:
                reporter.message(moved)
            server = _server(experiment, method, run, clients, metrics, reporter)
            course = Course(to.standings, to.stopped) if to else Course()
            if course.has_stopped(server):
                reporter.message(f"the run has ended after round {checkpoint.round}")
            checkpoint = run_rounds(server, checkpoint, course)
    except KeyboardInterrupt as error:
        hint = f"the same command with --resume goes on after round {_last_kept(run)}"
        raise KeyboardInterrupt(hint) from error
    except OutOfMemory as error:
        raise OutOfMemory(
            f"{error}. --resume goes on after round {_last_kept(run)}, also with another device or "
            "gradient_checkpointing; other changes need a new run"
        ) from error
    finally:
        with suppress(UserError):  # a full disk has been reported already
            write_report(run)
    return write_run_adapter(checkpoint, config, experiment.adapted.model, run)


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _starting_point(
    run: Path, experiment: Experiment, strategy: Strategy, to: Resumption | None, at_sites: bool
) -> Checkpoint:
    """The checkpoint to go on from, or the state before round 1 where there is none."""
    if to:
        require_same_data(run, experiment, at_sites)
        return read_checkpoint(run, to.round)
    state = initial_state(experiment.config, experiment.adapted, strategy, experiment.profiles)
    return Checkpoint(0, 0, state)


def _metrics(run: Path, checkpoint: Checkpoint, on_event: OnEvent | None, look: Look) -> MetricsFile:
    def tell(event: dict[str, Any]) -> None:
        look()
        if on_event is not None:
            on_event(event)

    return MetricsFile(run / METRICS_FILE, checkpoint.metrics_bytes, tell)


def _remaining_batches(experiment: Experiment, last_round: int) -> int:
    """Batches of all clients that the rounds after `last_round` will sample; with epochs about as many."""
    config, k = experiment.config, experiment.adapted.num_experts_per_tok
    steps = {(cost.client, cost.trained_experts): cost.steps for cost in experiment.cost.clients}
    with_rows = [profile for profile in experiment.profiles if profile.num_examples]
    return config.training.gradient_accumulation_steps * sum(
        steps[profile.client, config.trained_experts(k, number)[profile.client]]
        for number in range(last_round + 1, config.server.num_server_rounds + 1)
        for profile in training_clients(config, with_rows, number)
    )


def _last_kept(run: Path) -> int:
    return max(kept_rounds(run), default=0)


@contextmanager
def _clients(
    experiment: Experiment, run: Path, workers: int, sites: Sites | None, reporter: Reporter
) -> Iterator[Clients]:
    if sites is not None:
        with site_clients(sites, experiment, run, reporter.message) as at_sites:
            yield at_sites
        return
    with _clients_here(experiment, run, workers, reporter) as here:
        if not experiment.config.privacy.secure_aggregation:
            yield here
            return
        with TemporaryDirectory() as waiting:
            yield MaskedClients(here, Path(waiting))


@contextmanager
def _clients_here(experiment: Experiment, run: Path, workers: int, reporter: Reporter) -> Iterator[Clients]:
    config, adapted = experiment.config, experiment.adapted
    residuals = Residuals(run / RESIDUALS, config.server.save_total_limit)
    own = LocalClients(
        adapted,
        experiment.encoded.clients,
        pad_token(experiment.encoder.tokenizer),
        residuals,
        experiment.federation.names,
        experiment.tests,
    )
    if workers == 1:
        yield own
        return
    _, *others = worker_devices(experiment.device, workers)
    if 0 < len(experiment.device.cards) < workers:
        reporter.message(f"{workers} workers on {len(experiment.device.cards)} cards: several share a card")
    setups = [
        WorkerSetup(
            config.model.model_name_or_path,
            adapted.dtype,
            config.adapter,
            config.training.gradient_checkpointing,
            device,
            own.rows,
            own.pad_token_id,
            residuals,
            torch.get_num_threads(),
            own.tests,
        )
        for device in others
    ]
    with WorkerClients(own, setups) as clients:
        yield clients


def _server(
    experiment: Experiment,
    strategy: Strategy,
    run: Path,
    clients: Clients,
    metrics: MetricsFile,
    reporter: Reporter,
) -> Server:
    config, k = experiment.config, experiment.adapted.num_experts_per_tok
    return Server(
        config=config,
        run=run,
        strategy=strategy,
        profiles=[
            replace(profile, num_examples=rows)
            for profile, rows in zip(experiment.profiles, clients.num_examples(), strict=True)
            if profile.num_examples  # whoever owns no row trains nothing
        ],
        scorers=_scorers(experiment),
        tiers=config.evaluated_experts(k),
        deployments=config.cut_deployments(k),
        training_flops=partial(_training_flops, experiment),
        clients=clients,
        adapted=experiment.adapted,
        held_out=experiment.held_out,
        max_length=experiment.encoder.max_length,
        row_length=experiment.cost.sequence_length,
        metrics=metrics,
        reporter=reporter,
    )


def _scorers(experiment: Experiment) -> list[ClientProfile]:
    """All clients, or the one that trains alone: the others do not see what it has learned."""
    alone = experiment.config.data.trained_by
    return [one for one in experiment.profiles if alone in ("each", "one", str(one.client))]


def _training_flops(experiment: Experiment, k: int, rank: int) -> float:
    cost = experiment.cost
    setting: tuple[Any, ...] = (cost.sequence_length, cost.labelled_share)
    return training_flops(experiment.config, experiment.shape, k, rank, *setting)
