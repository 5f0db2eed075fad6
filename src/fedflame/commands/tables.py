"""The tables that a person sees on the console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedflame.commands.progress import say_line
from fedflame.cost.run_cost import ClientCost, RunCost
from fedflame.report.numbers import decimal, percent, si
from fedflame.report.records import Run
from fedflame.report.results import SCORE_LABELS, score_format
from fedflame.report.tasks import task_headers, task_rows
from fedflame.run_files.task_scores import TaskScores

if TYPE_CHECKING:
    from fedflame.compare.tables import ResultTable
    from fedflame.experiment.private_clients import PrivateClient

CATEGORIES_SHOWN = 3


def partition_table(
    clients: Sequence[dict[str, Any]], costs: Sequence[ClientCost], truncated: int, sites: Sequence[str] = ()
) -> Table:
    """Per client: k, rows, optimizer steps and training FLOPs per round, and its largest categories.

    Of a client that trains with several k in turn the least and the most of them. The rows that it scores
    follow those that it trains on. Of sites, if there are any, the names, and no rows: they have their own.
    """
    what = "Sites" if sites else f"Partition ({truncated} rows truncated)"
    title = f"{what}; steps and training FLOPs per round"
    table = _table(title, "client", "k", "trains at", "rows", "steps", "FLOPs", "largest categories")
    for client in clients:
        ranked = sorted(client["per_category"].items(), key=lambda item: -item[1])
        largest = ", ".join(f"{name} {rows}" for name, rows in ranked[:CATEGORIES_SHOWN] if rows)
        turns = [cost for cost in costs if cost.client == client["client"]]
        cells = (
            sites[client["client"]] if sites else client.get("name", str(client["client"])),
            str(client["active_experts"]),
            ",".join(str(cost.trained_experts) for cost in turns),
            "its own" if sites else _rows(client),
            _range([f"{cost.steps:,}" for cost in sorted(turns, key=lambda cost: cost.steps)]),
            _range([si(cost.training_flops) for cost in sorted(turns, key=lambda cost: cost.training_flops)]),
            "" if sites else largest,
        )
        table.add_row(*map(Text, cells))  # labels and names may have brackets, which rich takes as markup
    return table


def _rows(client: dict[str, Any]) -> str:
    scored = client.get("test_rows", 0)
    return f"{client['rows']:,}" + (f" + {scored:,} scored" if scored else "")


def print_rows(columns: Sequence[str], cut_prompts: int, console: Console) -> None:
    """Say which columns were read, and how many held-out prompts do not fit into the model's context."""
    for line in columns:
        say_line(console, line)
    if cut_prompts:
        say_line(
            console,
            f"held-out prompts that are cut: {cut_prompts:,}; with evaluation.max_new_tokens they are longer "
            "than the model's context",
        )


def _range(rising: Sequence[str]) -> str:
    """The first and the last, once where they are the same."""
    return " to ".join(dict.fromkeys((rising[0], rising[-1])))


def cost_table(cost: RunCost) -> Table:
    """Per k and rank: FLOPs per token, adapter bytes per round, expected memory."""
    rows, head = f"rows of {cost.sequence_length} tokens", f"head at {cost.labelled_share:.0%} of them"
    columns = ("k", "r", "clients", "forward", "of full k", "training", "down", "up to", "memory")
    table = _table(f"FLOPs per token ({rows}, {head}), bytes per client and round", *columns)
    for tier, memory in zip(cost.tiers, cost.memory, strict=True):
        table.add_row(
            str(tier.active_experts),
            str(tier.rank),
            str(tier.clients),
            si(tier.forward_flops_per_token),
            percent(tier.relative_to_full),
            si(tier.training_flops_per_token),
            si(tier.bytes_down, "B"),
            si(tier.bytes_up, "B"),
            si(memory.total, "B"),
        )
    return table


LOUD_NOISE = 10
"""Times the clip norm, of the noise in the mean of a step, from which on a plan warns of it."""


def print_privacy(clients: Sequence[PrivateClient], delta: float, console: Console) -> None:
    """Per client what the run spends, and whether a run of this size learns.

    The noise is that of the sum of a step over the clip norm, and, in the last column, of its mean.
    """
    title = f"Privacy of each row over the whole run, delta = {delta:g} (docs/privacy.md)"
    columns = ("client", "rows", "sampled", "steps", "noise", "epsilon", "of a step")
    table = _table(title, *columns)
    for client in clients:
        table.add_row(
            str(client.client),
            f"{client.rows:,}",
            percent(client.sampling_rate),
            f"{client.steps:,}",
            f"{client.noise_multiplier:.3g}",
            f"{client.epsilon:.3g}",
            f"{client.noise_over_clip:.3g}",
        )
    console.print(table)
    loudest = max(clients, key=lambda client: client.noise_over_clip)
    if loudest.noise_over_clip > LOUD_NOISE:
        say_line(
            console,
            f"the noise of a step is {loudest.noise_over_clip:.0f} times as long as the longest gradient of "
            f"a row, so that little of it is heard. {_more_rows(loudest)} or a larger privacy.epsilon help",
        )


def _more_rows(client: PrivateClient) -> str:
    if client.sampling_rate == 1:
        return "More rows at the client"
    return "More rows in a step (training.per_device_train_batch_size), more rows at the client"


def result_table(run: Run) -> Table:
    """Per tier: loss and score before and after, cost, tokens and bytes; the run's last word."""
    score = run.score_name()
    label = SCORE_LABELS[score].lower() if score else "score"
    title = f"Global model: loss and {label} before and after; forward FLOPs per token; tokens trained"
    columns = ("k", "clients", "loss", "", label.split()[-1], "", "FLOPs", "tokens", "up", "down")
    table = _table(title, *columns)
    flops = run.forward_flops()
    show = score_format(score) if score else decimal
    for tier in run.tiers():
        updates = [update for update in run.updates if update.active_experts == tier]
        scores = run.before_after(score, tier) if score else (None, None)
        table.add_row(
            str(tier),
            str(sum(k == tier for k in run.clients().values())),
            *(decimal(value) for value in run.before_after("loss", tier)),
            *(show(value) for value in scores),
            si(flops.get(tier)),
            si(sum(update.tokens for update in updates)),
            si(sum(update.bytes_up for update in updates), "B"),
            si(sum(update.bytes_down for update in updates), "B"),
        )
    return table


def score_table(scores: dict[int, dict[str, Any]]) -> Table:
    """Per k: loss, exact match and ROUGE-L over all held-out rows."""
    table = _table("Held-out rows", "k", "loss", "exact match", "ROUGE-L", "rows")
    for k, values in scores.items():
        together = values["all"]
        table.add_row(
            str(k),
            decimal(together["loss"]),
            percent(together["exact_match"]),
            decimal(together["rouge_l"], 3),
            str(together["rows"]),
        )
    return table


def task_table(scores: TaskScores) -> Table:
    """By k: every metric with its standard error, tokens per second and peak memory."""
    table = _table("Tasks by k", *task_headers(scores))
    for row in task_rows(scores):
        table.add_row(*map(Text, row))
    return table


def bench_table(measurements: Sequence[dict[str, Any]], device: str) -> Table:
    """Per tokens and k: each method's time, what `ours` takes of it, saved bytes and peak."""
    clock = "CPU time, one thread" if device == "cpu" else "GPU time"
    columns = ("tokens", "k", "method", "seconds", "ours takes", "saved for backward", "peak")
    table = _table(f"One MoE block, forward and backward; {clock}", *columns)
    cells = [(row["tokens"], row["active_experts"]) for row in measurements]
    ours = {cell: row for cell, row in zip(cells, measurements, strict=True) if row["method"] == "ours"}
    for number, (cell, row) in enumerate(zip(cells, measurements, strict=True)):
        table.add_row(
            *(f"{size:,}" for size in cell),
            row["method"],
            decimal(row["seconds"], 4),
            f"{ours[cell]['seconds'] / row['seconds']:.3f} of it" if cell in ours else "",
            si(row["saved_bytes"], "B"),
            si(row["peak_bytes"], "B"),
            end_section=cells[number + 1 : number + 2] != [cell],
        )
    return table


def comparison_table(result: ResultTable, where: str) -> Table:
    """One table of a comparison; `where` is its setting, or empty."""
    title = f"{result.title} ({where})" if where else result.title
    table = Table(
        title=Text(title, "table.title"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for number, header in enumerate(result.headers):
        table.add_column(header, justify="right" if number else "left", no_wrap=not number)
    for row in result.rows:
        table.add_row(*(Text(f"{entry.text}\n{entry.detail}".strip()) for entry in row))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=Text(title, "table.title"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in columns:
        text = column in ("task", "largest categories")
        table.add_column(column, justify="left" if text else "right", no_wrap=not text)
    return table
