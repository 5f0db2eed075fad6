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
    return sample_clients(clients, _count(config, clients), config.seed, round_number)


def rounds_of(config: RunConfig, clients: Sequence[int], client: int, last_round: int) -> int:
    """Return how many of the rounds up to the last ask this one of the clients to train."""
    count = _count(config, clients)
    if count == len(clients):
        return last_round
    rounds = range(1, last_round + 1)
    return sum(client in _sample(clients, count, config.seed, number, "sample") for number in rounds)


def sample_clients(
    clients: Sequence[ClientProfile], count: int, seed: int, round_number: int, purpose: str = "sample"
) -> list[ClientProfile]:
    """Draw a seeded sample of `count` clients, in client order. It does not depend on the given order."""
    by_number = {profile.client: profile for profile in clients}
    return [by_number[number] for number in _sample([*by_number], count, seed, round_number, purpose)]


def _sample(clients: Sequence[int], count: int, seed: int, round_number: int, purpose: str) -> list[int]:
    draw = random.Random(derive_seed(seed, purpose, round_number))
    return sorted(draw.sample(sorted(clients), count))


def _count(config: RunConfig, clients: Sequence[object]) -> int:
    return min(config.clients_per_round(), len(clients))
