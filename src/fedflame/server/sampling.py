"""Which clients are asked, drawn from the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fedflame.seeds import derive_seed
from fedflame.strategies.base import ClientProfile


def sample_clients(
    clients: Sequence[ClientProfile], count: int, seed: int, round_number: int, purpose: str = "sample"
) -> list[ClientProfile]:
    """Draw a seeded sample of `count` clients, in client order. It does not depend on the given order."""
    ordered = sorted(clients, key=lambda profile: profile.client)
    chosen = random.Random(derive_seed(seed, purpose, round_number)).sample(ordered, count)
    return sorted(chosen, key=lambda profile: profile.client)
