"""The section on tasks of lm-evaluation-harness: scores, speed and memory by k."""

from __future__ import annotations

from fedflame.report.markup import Markup, join, note, section, table
from fedflame.report.numbers import MISSING, decimal, si
from fedflame.report.records import Run
from fedflame.report.results import tier_label
from fedflame.run_files.task_scores import Metric, TaskScores


def task_headers(scores: TaskScores) -> list[str]:
    """Return the columns of the table: what was measured, then every k."""
    return ["task", *(tier_label(at_k.active_experts) for at_k in scores.by_k)]


def task_rows(scores: TaskScores) -> list[list[str]]:
    """Return the rows of the table, under `task_headers`: every metric, then speed and memory."""
    measured = [{(metric.task, metric.name): metric for metric in at_k.metrics} for at_k in scores.by_k]
    metrics = dict.fromkeys(name for of_k in measured for name in of_k)
    return [
        *([" ".join(name), *(_value(of_k.get(name)) for of_k in measured)] for name in metrics),
        ["prompt tokens/s", *(si(at_k.prompt_tokens_per_second) for at_k in scores.by_k)],
        ["new tokens/s", *(si(at_k.new_tokens_per_second) for at_k in scores.by_k)],
        ["peak memory", *(si(at_k.peak_memory, "B") for at_k in scores.by_k)],
    ]


def _value(metric: Metric | None) -> str:
    if metric is None:
        return MISSING
    return decimal(metric.value, 4) + ("" if metric.stderr is None else f" ± {decimal(metric.stderr, 4)}")


def tasks(run: Run) -> Markup:
    """Show what the model scored in tasks at each k, and what that costs; empty if it was not asked."""
    scores = run.tasks
    if scores is None:
        return join([])
    text = (
        f"After round {scores.round}: {scores.in_words()}. ± is the standard error. Speed is of one row, in "
    )
    text += "fedflame's own process; another server has other speeds. Compare the columns with one another."
    return section("Tasks", table(task_headers(scores), task_rows(scores), "headline"), note(text))
