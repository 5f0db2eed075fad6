"""`fedflame evaluate`: score a run, an adapter or a base model on held-out rows or in tasks, by k."""

from __future__ import annotations

import io
import math
import sys
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from rich.console import Console

from fedflame.commands.progress import say_line, say_used_rounds
from fedflame.commands.tables import score_table, task_table
from fedflame.config.lists import parse_integers
from fedflame.errors import NotFinite, UserError
from fedflame.experiment.api import evaluate
from fedflame.experiment.run_folder import is_run
from fedflame.experiment.source import is_adapter
from fedflame.experiment.tasks import TaskOptions, evaluate_tasks, keep_task_scores
from fedflame.json_text import to_text
from fedflame.run_files.checkpoints import kept_rounds
from fedflame.training.scores import Scores, total


def print_scores(
    source: str, active_experts: str | None, overrides: list[str], as_json: bool, console: Console
) -> None:
    """Print scores per k as a table, or per k and category as JSON.

    Args:
        source: a run folder, an adapter folder, or a base model by folder or name.
        active_experts: the k to evaluate at, such as "8,4"; None for the tiers of the configuration.
        overrides: configuration over the run's own, or over the defaults.
        as_json: print one JSON object.
        console: where tables go.

    Raises:
        UserError: a source that is none of these, or a k that the model does not have.
        NotFinite: the scores are printed, and a loss is not finite.
    """
    wanted = _wanted(active_experts)
    if is_adapter(Path(source)) and any(one.startswith("data.dataset_name=") for one in overrides):
        say_line(
            Console(stderr=True),
            "warning: the adapter does not say which rows it was trained on; some of those held out here may "
            "be among them (--data scores all rows of a file of your own)",
        )
    found = evaluate(source, active_experts=wanted, overrides=overrides)
    scores = {k: {"all": total(of_k).to_json()} | _plain(of_k) for k, of_k in found.items()}
    if as_json:
        print(to_text(scores, indent=2))
    else:
        console.print(score_table(scores))
        if is_run(Path(source)):
            say_used_rounds(Path(source), console)
    if broken := [f"k = {k}" for k, of_k in scores.items() if not math.isfinite(of_k["all"]["loss"])]:
        rounds = kept_rounds(Path(source))
        after = f" after round {rounds[-1]}" if rounds else ""
        raise NotFinite(f"{source}: the loss is not finite at {', '.join(broken)}{after}")


def print_task_scores(
    source: str,
    options: TaskOptions,
    active_experts: str | None,
    overrides: list[str],
    as_json: bool,
    console: Console,
) -> None:
    """Print scores in tasks, speed and memory per k, and keep those of a run in its folder and its report.

    Args:
        source: as in `print_scores`.
        options: what to ask the harness for.
        active_experts: the k to evaluate at, such as "8,4"; None for the tiers of the source.
        overrides: configuration over the run's own, or over the defaults.
        as_json: print one JSON object.
        console: where the table goes.

    Raises:
        UserError: see `evaluate_tasks`.
    """
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    with bars:  # the harness shows its progress on stderr, wherever that goes
        scores = evaluate_tasks(source, options, _wanted(active_experts), overrides)
    if as_json:
        print(to_text(scores.model_dump(), indent=2))
    else:
        console.print(task_table(scores))
        say_line(console, scores.in_words())
        if is_run(Path(source)):
            say_used_rounds(Path(source), console)
    if is_run(Path(source)):
        keep_task_scores(Path(source), scores)


def _plain(scores: dict[str, Scores]) -> dict[str, dict[str, Any]]:
    return {category: value.to_json() for category, value in scores.items()}


def _wanted(active_experts: str | None) -> tuple[int, ...]:
    try:
        return parse_integers(active_experts) if active_experts else ()
    except ValueError as error:
        raise UserError(f"--active-experts {active_experts!r}: {error}") from error
