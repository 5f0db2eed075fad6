"""`fedflame plan`: partition, tiers and costs of a run, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from fedflame.base.device import device_in_words
from fedflame.commands.progress import say_line
from fedflame.commands.tables import cost_table, partition_table, print_privacy, print_rows
from fedflame.cost.scoring_cost import ScoringCost
from fedflame.data.encoding import Shown
from fedflame.experiment.plan import Plan
from fedflame.json_text import to_text
from fedflame.reading import escaped
from fedflame.report.numbers import plural


def print_plan(plan: Plan, as_json: bool, show_row: bool, console: Console) -> None:
    """Print a plan as tables, or as one JSON object, and a row as it is trained on."""
    if as_json:
        row = [{"text": part.text, "has_loss": part.has_loss} for part in plan.first_row]
        print(to_text(plan.to_json() | ({"first_row": row} if show_row else {}), indent=2))
        return
    print_rows(plan.columns, plan.cut_prompts, console)
    console.print(partition_table(plan.clients, plan.cost.clients, plan.truncated_rows))
    console.print(cost_table(plan.cost))
    if plan.privacy:
        print_privacy(plan.privacy, plan.config.privacy.delta, console)
    console.print(f"memory for the base in {plan.dtype.name} ({plan.dtype.reason})")
    say_line(console, f"device {device_in_words(plan.device)}")
    console.print(_adapter_line(plan))
    if plan.cost.scoring.clients:
        console.print(_scoring_line(plan.cost.scoring))
    if plan.skipped_rows:
        console.print(f"{plan.skipped_rows:,} rows cannot be used")
    if show_row:
        _print_row(plan.first_row, console)


def _print_row(row: Sequence[Shown], console: Console) -> None:
    """Print a row line by line, with a mark before what has loss; control characters are escaped."""
    if not row:
        say_line(console, "no row to show: the model folder has no tokenizer, or --sequence-length is given")
        return
    say_line(console, "first row of client 0; what has loss stands after >")
    for part in row:
        for line in part.text.splitlines(keepends=True):
            say_line(console, f"{'>' if part.has_loss else ' '} {escaped(line)}")


def _adapter_line(plan: Plan) -> str:
    cost, clients = plan.cost, plan.config.clients_per_round()
    trained = [tier for tier in cost.tiers if tier.clients]
    down, up = max(tier.bytes_down for tier in trained), max(tier.bytes_up for tier in trained)
    adapter = cost.adapter
    line = (
        f"adapter: {adapter.total:,} parameters ({adapter.experts:,} on experts, {adapter.attention:,} on "
        f"attention); per round {clients} clients, at most {clients * down:,} bytes down and "
        f"{clients * up:,} up"
    )
    if cost.merged_bytes:
        line += f"; merged factors add up to {cost.merged_bytes:,} bytes down to each client with every round"
    return line


def _scoring_line(cost: ScoringCost) -> str:
    return (
        f"evaluation at {plural(cost.clients, 'client')}: {cost.evaluations} times, once before training; "
        f"each time at most {cost.bytes_down:,} bytes down and {cost.bytes_up:,} up"
    )
