"""`fedflame plan`: partition, tiers and costs of a run, without loading weights."""

from __future__ import annotations

import json

from rich.console import Console

from fedflame.base_model import choose_dtype, has_tokenizer, load_tokenizer, model_config_path
from fedflame.budgets import read_model_shape
from fedflame.commands.tables import cost_table, partition_table
from fedflame.config import RunConfig
from fedflame.cost import RunCost, run_cost
from fedflame.data.federation import describe, encode_federation, load_federation


def print_plan(config: RunConfig, sequence_length: int | None, as_json: bool, console: Console) -> None:
    """Print the plan as tables or JSON.

    Args:
        config: the run that is planned.
        sequence_length: FLOPs are for rows of so many tokens with the head at each of them; None for
            the rows of the data, or `data.max_length` where the model folder has no tokenizer.
        as_json: print one JSON object.
        console: where tables go.

    Raises:
        UserError: unusable data or model, or tiers that the model cannot run.
    """
    path = model_config_path(config.model.model_name_or_path)
    shape = read_model_shape(path)
    federation = load_federation(config)
    length, share, truncated = sequence_length or config.data.max_length, 1.0, 0
    folder = path if path.is_dir() else path.parent
    if sequence_length is None and has_tokenizer(folder):
        encoded = encode_federation(federation, load_tokenizer(folder), config.data.max_length)
        length, share, truncated = encoded.mean_length, encoded.labelled_share, encoded.truncated
    clients = describe(federation, config.tiers())
    dtype = choose_dtype(config.model.dtype, shape)
    cost = run_cost(config, shape, dtype.name, length, share)
    if as_json:
        rows = {"truncated_rows": truncated, "skipped_rows": len(federation.skipped)}
        sampled = {"clients_per_round": config.clients_per_round()}
        costs = cost.to_json()
        costs["clients"] = [clients[cost["client"]] | cost for cost in costs["clients"]]
        print(json.dumps({**rows, **sampled, **costs}, indent=2))
        return
    console.print(partition_table(clients, cost.clients, truncated))
    console.print(cost_table(cost))
    console.print(f"memory for the base in {dtype.name} ({dtype.reason})")
    console.print(_adapter_line(config, cost))


def _adapter_line(config: RunConfig, cost: RunCost) -> str:
    adapter, clients = cost.adapter, config.clients_per_round()
    trained = [tier for tier in cost.tiers if tier.clients]
    down, up = max(tier.bytes_down for tier in trained), max(tier.bytes_up for tier in trained)
    line = (
        f"adapter: {adapter.total:,} parameters ({adapter.experts:,} on experts, {adapter.attention:,} on "
        f"attention); per round {clients} clients, at most {clients * down:,} bytes down and "
        f"{clients * up:,} up"
    )
    if cost.merged_bytes:
        line += f"; merged factors add up to {cost.merged_bytes:,} bytes down to each client with every round"
    return line
