"""Compute what evaluations at the clients send: the adapter to each that is asked, and sums back."""

from __future__ import annotations

from dataclasses import dataclass

from fedflame.config.run_config import RunConfig
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.model_shape import ModelShape

SUMS_BYTES = 500
"""What the sums of one client take at most: a few numbers under their names."""


@dataclass(frozen=True)
class ScoringCost:
    """The bytes of one evaluation at the clients, of all that are asked together."""

    clients: int
    """Clients that are asked each time, at most; 0 if none are."""
    evaluations: int
    """How often they are asked, the time before training among them."""
    bytes_down: int
    """The adapters that they deploy, without headers; the largest, where not all clients are asked."""
    bytes_up: int
    """Their sums, with headers, at most."""


def scoring_cost(config: RunConfig, shape: ModelShape) -> ScoringCost:
    """Return the bytes of the evaluations at the clients.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    clients = config.evaluating_clients()
    ranks = sorted((rank for _, rank in config.deployed(shape.num_experts_per_tok)), reverse=True)
    sizes = [adapter_parameters(shape, rank, config.adapter.target_modules) for rank in ranks[:clients]]
    rounds, every = range(config.server.num_server_rounds + 1), config.evaluation.evaluate_every
    return ScoringCost(
        clients,
        sum(config.is_due(every, number) for number in rounds) if clients else 0,
        sum(size.bytes_down for size in sizes),
        clients * SUMS_BYTES,
    )
