"""Seeds derived from (seed, round, client, purpose), so that no global generator is touched."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator with the seed `derive_seed(*parts)`."""
    import torch  # here, because commands that need only seeds must not wait for torch

    return torch.Generator().manual_seed(derive_seed(*parts))
