"""Which clients are asked, drawn from the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedflame.config.run_config import RunConfig
from fedflame.seeds import derive_seed

if TYPE_CHECKING:
    from fedflame.strategies.base import ClientProfile


def training_clients(
    config: RunConfig, clients: Sequence[ClientProfile], round_number: int
) -> list[ClientProfile]:
    """Return those of the clients that train in a round, in client order."""
    count = min(config.clients_per_round(), len(clients))
    return sample_clients(clients, count, config.seed, round_number)


def sample_clients(
    clients: Sequence[ClientProfile], count: int, seed: int, round_number: int, purpose: str = "sample"
) -> list[ClientProfile]:
    """Draw a seeded sample of `count` clients, in client order. It does not depend on the given order."""
    ordered = sorted(clients, key=lambda profile: profile.client)
    chosen = random.Random(derive_seed(seed, purpose, round_number)).sample(ordered, count)
    return sorted(chosen, key=lambda profile: profile.client)
