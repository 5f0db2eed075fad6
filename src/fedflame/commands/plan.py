"""`fedflame plan`: partition, tiers and costs of a run, without loading weights."""

from __future__ import annotations

import json

from rich.console import Console

from fedflame.commands.tables import cost_table, partition_table
from fedflame.config.run_config import RunConfig
from fedflame.experiment.api import plan
from fedflame.experiment.plan import Plan


def print_plan(config: RunConfig, sequence_length: int | None, as_json: bool, console: Console) -> None:
    """Print the plan as tables or JSON; see `fedflame.plan`.

    Args:
        config: the run that is planned.
        sequence_length: of the rows that FLOPs are for; None for the rows of the data.
        as_json: print one JSON object.
        console: where tables go.

    Raises:
        UserError: unusable data or model, or tiers that the model cannot run.
    """
    planned = plan(config, sequence_length=sequence_length)
    if as_json:
        print(json.dumps(planned.to_json(), indent=2))
        return
    console.print(partition_table(planned.clients, planned.cost.clients, planned.truncated_rows))
    console.print(cost_table(planned.cost))
    console.print(f"memory for the base in {planned.dtype.name} ({planned.dtype.reason})")
    console.print(_adapter_line(planned))


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
