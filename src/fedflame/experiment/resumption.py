"""From which checkpoint a run goes on, and that everything which it then reads is whole. Needs no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflame.checked_json import read_checked
from fedflame.config.run_config import RunConfig
from fedflame.run_files import ADVICE
from fedflame.run_files.checkpoints import kept_round, kept_rounds, read_sealed, remove_later
from fedflame.run_files.lines import FILE_NAME, read_lines
from fedflame.run_files.residuals import read_residual, residual_path
from fedflame.run_files.standing import Standing, best_rounds, standings, taken

RESIDUALS = "residuals"
"""The folder of what clients owe."""


@dataclass(frozen=True)
class Resumption:
    """The kept round that a run goes on after."""

    round: int
    metrics_bytes: int
    standings: Sequence[Standing]
    """What the evaluations until then add up to."""
    stopped: bool
    """Whether the run has stopped there."""


def find_resumption(run: Path, config: RunConfig, wanted: int | None = None) -> Resumption | None:
    """The checkpoint to go on from; None where the run had not reached its first one.

    Args:
        run: the run folder.
        config: its configuration.
        wanted: a kept round; None for the last.

    Raises:
        UserError: a file that the resumed run reads, now or at its end, is missing or damaged.
    """
    if wanted is None and not kept_rounds(run) and not _has_trained(run):
        return None
    for name in ("environment.json", "partition.json", "plan.json"):
        read_checked(run / name, ADVICE)
    number = kept_round(run, wanted)
    _, header = read_sealed(run, number)
    size = header["metrics_bytes"]
    events = list(read_lines(run / FILE_NAME, size, size, _advice(run, number)))
    if config.error_feedback():
        _require_residuals(run, events)
    metric, threshold = config.server.metric_for_best_model, config.server.early_stopping_threshold
    known = standings(taken(events, metric), metric, threshold)
    if config.server.load_best_model_at_end:
        for best in {*best_rounds(known, number).values()} - {number}:
            read_sealed(run, best)
    stopped = any((event["event"], event["round"]) == ("stopped", number) for event in events)
    return Resumption(number, size, known, stopped)


def go_back(run: Path, to: Resumption) -> None:
    """Remove what the run made after this round, so that a kill on the way leaves a run that goes on.

    Raises:
        UserError: it cannot be removed.
    """
    if kept_rounds(run)[-1] > to.round:
        shutil.rmtree(run / "adapter", ignore_errors=True)
        remove_later(run, to.round)


def _has_trained(run: Path) -> bool:
    """Whether metrics.jsonl speaks of a round, before which there was a checkpoint."""
    path = run / FILE_NAME
    return path.exists() and any(event.get("round", 0) > 0 for event in read_lines(path, advice=ADVICE))


def _require_residuals(run: Path, events: list[dict[str, Any]]) -> None:
    last = {event["client"]: event["round"] for event in events if event.get("event") == "client"}
    for client, number in last.items():
        read_residual(residual_path(run / RESIDUALS, client, number))


def _advice(run: Path, number: int) -> str:
    """What to do where the metrics up to this round cannot be used: an earlier round needs fewer of them."""
    if any(kept < number for kept in kept_rounds(run)):
        return f"{ADVICE}; where the damage is late, an earlier round of --resume-from needs less of it"
    return ADVICE
