"""The bounds of a comparison: what a client has alone, and what all rows in one place would give.

`standalone`: a client trains on its own rows only, with the k that it affords, from the same start, in as
many rounds with as many steps as it has in the federation. `centralised`: one client with the model's K
trains on the rows of all, in as many steps as all clients together. Both are FLAME with one client, whose
mean is the client itself, so that optimizer, schedule, seeds and held-out rows are those of the methods.
"""

from __future__ import annotations

from typing import Literal

from fedflame.base.files import model_config_path
from fedflame.config.run_config import RunConfig
from fedflame.cost.model_shape import read_model_shape

Bound = Literal["standalone", "centralised"]

_ONE_CLIENT = (
    "strategy.k_rotation=none",
    "strategy.tier_affinity=1",
    "strategy.clip=none",
    "server.min_clients=1",
    "server.fraction_train=1",
    "training.proximal_mu=0",
    "communication.update_dtype=float32",
)
"""The default method with one client: nothing is mixed, held near others, cut down, or rounded to travel."""


def bound_settings(bound: Bound, config: RunConfig) -> dict[str, list[str]]:
    """Return the cells of a bound by name, each with what it sets over the grid's base.

    Args:
        bound: which.
        config: the base at one point of the grid, without a method.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    clients, sampled = config.clients.num_clients, config.clients_per_round()
    if bound == "standalone":
        work = _work(config, sampled / clients, sampled / clients)
        return {f"standalone-{i}": [*_ONE_CLIENT, f"data.trained_by={i}", *work] for i in range(clients)}
    full = read_model_shape(model_config_path(config.model.model_name_or_path)).num_experts_per_tok
    place = ["data.trained_by=one", f"clients.active_experts={full}"]
    return {"centralised": [*_ONE_CLIENT, *place, *_work(config, sampled, sampled / clients)]}


def _work(config: RunConfig, steps: float, epochs: float) -> list[str]:
    """Return the settings for so many times a client's steps of a round, or for this share of its epochs."""
    training = config.training
    found = [f"training.max_steps={max(1, round(steps * training.max_steps))}"]
    if training.warmup_steps:
        found.append(f"training.warmup_steps={round(steps * training.warmup_steps)}")
    if training.num_train_epochs:
        found.append(f"training.num_train_epochs={epochs * training.num_train_epochs}")
    return found
