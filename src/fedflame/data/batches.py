"""Encoded rows as padded batches of similar length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedflame.data.encoding import EncodedRow

IGNORE_INDEX = -100
"""Label of positions without loss, as in torch's cross entropy."""
BATCHES_PER_WINDOW = 8
"""Rows are sorted by length within windows of about so many batches: little padding, still shuffled."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: `input_ids`, `attention_mask` and `labels`, each [batch, sequence]."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())


def collate(rows: Sequence[EncodedRow], pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest of them."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    for index, row in enumerate(rows):
        length, ids = len(row.ids), torch.tensor(row.ids)
        input_ids[index, :length] = ids
        attention_mask[index, :length] = 1
        labels[index, row.prompt_length : length] = ids[row.prompt_length :]
    return Batch(input_ids, attention_mask, labels)


def training_batches(
    rows: Sequence[EncodedRow], batch_size: int, pad_token_id: int, seed: int, tokens_per_step: int = 0
) -> Iterator[Batch]:
    """Endless batches, every row once per epoch, reshuffled by the seed; the last may be smaller.

    Args:
        rows: what is trained on.
        batch_size: rows per batch.
        pad_token_id: fills rows on the right to the longest of their batch.
        seed: of the order.
        tokens_per_step: if not 0, a batch has instead as many rows as fit in so many tokens, padding
            counted, and at least one.
    """
    rng = random.Random(seed)
    lengths = [len(row.ids) for row in rows]

    def capacity(length: float) -> int:
        return max(1, int(tokens_per_step // length)) if tokens_per_step else batch_size

    window = BATCHES_PER_WINDOW * capacity(sum(lengths) / len(lengths))
    while True:
        order = list(range(len(rows)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            alike = sorted(order[start : start + window], key=lengths.__getitem__)
            batches += _cut(alike, lengths, capacity)
        rng.shuffle(batches)
        for batch in batches:
            yield collate([rows[index] for index in batch], pad_token_id)


def _cut(alike: Sequence[int], lengths: Sequence[int], capacity: Callable[[float], int]) -> list[list[int]]:
    """Row indices of rising length into batches, each with at most the capacity at its longest row."""
    batches: list[list[int]] = [[]]
    for index in alike:
        if len(batches[-1]) >= capacity(lengths[index]):
            batches.append([])
        batches[-1].append(index)
    return batches
