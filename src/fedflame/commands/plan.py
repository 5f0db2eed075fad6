"""`fedflame plan`: partition, tiers and costs of a run, without loading weights."""

from __future__ import annotations

from rich.console import Console

from fedflame.base.device import device_in_words
from fedflame.commands.progress import say_line
from fedflame.commands.tables import cost_table, partition_table
from fedflame.experiment.plan import Plan
from fedflame.json_text import to_text


def print_plan(plan: Plan, as_json: bool, console: Console) -> None:
    """Print a plan as tables, or as one JSON object."""
    if as_json:
        print(to_text(plan.to_json(), indent=2))
        return
    console.print(partition_table(plan.clients, plan.cost.clients, plan.truncated_rows))
    console.print(cost_table(plan.cost))
    console.print(f"memory for the base in {plan.dtype.name} ({plan.dtype.reason})")
    say_line(console, f"device {device_in_words(plan.device)}")
    console.print(_adapter_line(plan))


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
