"""Encoded rows of random tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedflame.data.encoding import EncodedRow


def random_rows(lengths: Iterable[int], vocabulary: int, seed: int = 0, prompt: int = 2) -> list[EncodedRow]:
    """A row of each length, whose first `prompt` tokens have no loss."""
    generator = torch.Generator().manual_seed(seed)
    return [
        EncodedRow(torch.randint(3, vocabulary, (length,), generator=generator).tolist(), prompt, False)
        for length in lengths
    ]
