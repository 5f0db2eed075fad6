"""The Python API: what `import fedflame` offers, and what the command line calls.

import fedflame

run = fedflame.run({"output_dir": "runs/first", "server": {"num_server_rounds": 3}})
run.scores[3][1]["loss"]   # of the global model after round 3, with one expert per token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedflame.config.load import given_values, load_config, set_num_clients
from fedflame.config.run_config import RunConfig
from fedflame.data.given import GivenRows, given_rows
from fedflame.data.sources import IN_MEMORY
from fedflame.errors import UserError
from fedflame.experiment.finished_run import Run
from fedflame.experiment.plan import Plan, plan_run
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run_folder import Existing

if TYPE_CHECKING:
    from fedflame.exports import Layout
    from fedflame.server.metrics import OnEvent
    from fedflame.strategies.base import Strategy
    from fedflame.training.scores import Scores

Config = str | Path | Mapping[str, Any] | RunConfig | None
"""The path of a TOML file, a dict with the same sections, a configuration, or None for the defaults."""


def run(
    config: Config = None,
    *,
    data: Any = None,
    strategy: Strategy | None = None,
    on_event: OnEvent | None = None,
    workers: int = 1,
    resume: bool = False,
    resume_from: int | None = None,
    overwrite: bool = False,
) -> Run:
    """Fine-tune one model across unequal clients.

    Args:
        config: what to run; see `Config`. The defaults train the embedded model on generated rows.
        data: rows instead of those of `data.dataset_name`: a `datasets.Dataset`, a list of dicts, or a list
            with one of these for each client. The columns are recognised or named as those of a file are.
        strategy: a federated method instead of `strategy.name`: any object with the three hooks
            `initialize`, `configure_train` and `aggregate_train` of `Strategy`.
        on_event: called with each object that goes into metrics.jsonl, as it happens.
        workers: processes that train clients side by side, with the same result. A script that asks for more
            than one must not run anything when it is imported: `if __name__ == "__main__":`.
        resume: go on with the run in the run folder.
        resume_from: go on with it after this round, whose checkpoint is kept (`server.save_total_limit`).
        overwrite: replace the run in the run folder.

    Returns:
        The finished run with its scores, adapters, metrics and report.

    Raises:
        UserError: what the caller can mend, such as a value that is not allowed, rows that cannot be used, or
            a run folder that exists.
        KeyboardInterrupt: with the round that `resume=True` goes on after.
    """
    going_on = resume or resume_from is not None
    if going_on and overwrite:
        raise UserError("resume and overwrite exclude each other; give one")
    if workers < 1:
        raise UserError(f"workers = {workers}: must be at least 1")
    loaded, rows = _resolved(config, data, strategy)
    existing: Existing = "resume" if going_on else "overwrite" if overwrite else "refuse"
    prepared = prepare(loaded, existing, given=rows, resume_from=resume_from)
    from fedflame.experiment.run import run_experiment  # from here on with torch

    run_experiment(prepared, workers=workers, strategy=strategy, on_event=on_event)
    return Run(Path(loaded.output_dir))


def plan(config: Config = None, *, data: Any = None, sequence_length: int | None = None) -> Plan:
    """What a run will do and cost, without loading weights.

    Args:
        config: what to run; see `Config`.
        data: rows instead of those of `data.dataset_name`; see `run`.
        sequence_length: FLOPs are for rows of so many tokens; None: for the rows of the data.

    Returns:
        The partition over the clients, and FLOPs, bytes and memory by tier.

    Raises:
        UserError: data or model cannot be used, or the model cannot run a client's k.
    """
    loaded, rows = _resolved(config, data)
    return plan_run(loaded, sequence_length, rows)


def evaluate(
    source: str | Path | Run,
    *,
    active_experts: Sequence[int] = (),
    data: Any = None,
    overrides: Sequence[str] = (),
) -> dict[int, dict[str, Scores]]:
    """Score a run, an adapter or a base model on held-out rows at any k.

    Args:
        source: a run, a run folder, an adapter folder, or a base model by folder or name.
        active_experts: the k to evaluate at; empty: those of the source.
        data: rows instead of those of the run; see `run`. Which of them are held out follows from the seed.
        overrides: `section.key=value` over the run's own configuration, or over the defaults.

    Returns:
        k -> category -> scores. The loss is in nats per response token; exact match and ROUGE-L are from 0
        to 1.

    Raises:
        UserError: a source that is none of these, or a k that the model does not have.
    """
    from fedflame.experiment.scores import score_source

    place = source.folder if isinstance(source, Run) else source
    return score_source(str(place), active_experts, overrides, None if data is None else given_rows(data))


def export(
    run: str | Path | Run,
    to: str | Path,
    *,
    merge: bool = False,
    active_experts: int | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
    check: bool = False,
) -> Path:
    """Write a run's adapter for PEFT, or merge it into a stock checkpoint.

    Args:
        run: a run or its folder.
        to: the folder to write.
        merge: a stock checkpoint instead of an adapter.
        active_experts: with `merge`, the k whose rescaler is folded in; None: the model's own K.
        layout: "per-expert" or "fused"; None: the one that PEFT reads for the model family.
        overwrite: replace an earlier export.
        check: load what was written as a user does, and hold its outputs to the run's.

    Returns:
        The folder that was written.

    Raises:
        UserError: it is no run, has no checkpoint, the folder must not be replaced, or the check fails.
    """
    from fedflame.experiment.export import ExportOptions, export_run

    place = run.folder if isinstance(run, Run) else Path(run)
    export_run(place, Path(to), ExportOptions(merge, active_experts, layout, overwrite, check))
    return Path(to)


def _resolved(
    config: Config, data: Any, strategy: Strategy | None = None
) -> tuple[RunConfig, GivenRows | None]:
    """The configuration with what rows and strategy say of it, checked as a whole."""
    rows = None if data is None else given_rows(data)
    overrides = [f"data.dataset_name={IN_MEMORY}"] if rows else []
    overrides += ["strategy.name=custom"] if strategy is not None else []
    if rows is None or not rows.per_client:
        return load_config(config, overrides), rows
    values = given_values(config)
    clients = values.setdefault("clients", {})
    if isinstance(clients, dict):  # otherwise `load_config` says what is wrong
        set_num_clients(clients, len(rows.sources), "data")
    return load_config(values, overrides), rows
