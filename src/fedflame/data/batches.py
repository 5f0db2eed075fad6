"""Make padded batches of encoded rows of similar length."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedflame.data.encoding import EncodedRow

IGNORE_INDEX = -100
"""Label of positions without loss, as in torch's cross entropy."""
_ROUNDING = 1e-9
"""0.7 of ten batches are seven, although 0.7 * 10 is more than 7 in floating point."""
BATCHES_PER_WINDOW = 8
"""Rows are sorted by length in windows of about this many batches: shuffled, but with little padding."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows: `input_ids`, `attention_mask` and `labels`, each [batch, sequence], on the CPU.

    What a step must know of them is read here, because reading it on a GPU would wait for the GPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens that are not padding."""
        return int(self.attention_mask.sum())

    @property
    def predictors(self) -> Tensor:
        """[T] the positions in the flattened batch that predict a labelled token, row by row."""
        return (self.labels[:, 1:] != IGNORE_INDEX).nonzero() @ torch.tensor([self.labels.shape[1], 1])

    @property
    def targets(self) -> Tensor:
        """[T] the labelled tokens, row by row; the first of a row has nothing that predicts it."""
        labels = self.labels[:, 1:]
        return labels[labels != IGNORE_INDEX]

    @property
    def real_tokens(self) -> Tensor | None:
        """The positions in the flattened batch that are no padding; None if all are."""
        mask = self.attention_mask.reshape(-1).bool()
        return None if bool(mask.all()) else mask.nonzero().flatten()

    def rounded(self) -> Batch:
        """Return it with more padding, so that different batches have the same width; see `round_up`."""
        more = round_up(self.input_ids.shape[1]) - self.input_ids.shape[1]
        return Batch(
            pad(self.input_ids, (0, more)),
            pad(self.attention_mask, (0, more)),
            pad(self.labels, (0, more), value=IGNORE_INDEX),
        )

    def on(self, device: torch.device) -> PlacedBatch:
        """Copy to a device what a step needs, without waiting for it."""
        return PlacedBatch(
            self.input_ids, self.attention_mask, self.predictors, self.targets, self.real_tokens
        ).to(device)

    def in_few_sizes(self, device: torch.device) -> PlacedBatch:
        """Copy it to a device in one of few sizes, filled up with what counts for nothing.

        All positions are computed, also padding, and a quarter, half, three quarters or all of them predict.
        """
        batch = self.rounded()
        predictors, targets = batch.predictors, batch.targets
        quarter = -(-batch.input_ids.numel() // 4)
        more = -len(predictors) % quarter
        return PlacedBatch(
            batch.input_ids,
            batch.attention_mask,
            pad(predictors, (0, more)),
            pad(targets, (0, more)),
            None,
            counted=batch.attention_mask.reshape(-1),
            weights=pad(torch.ones(len(predictors)), (0, more)),
        ).to(device)


class PlacedBatch(NamedTuple):
    """A batch on a device, as a step needs it; see `Batch`."""

    input_ids: Tensor
    attention_mask: Tensor
    predictors: Tensor
    targets: Tensor
    real_tokens: Tensor | None
    """The positions that experts compute; None for all."""
    counted: Tensor | None = None
    """For every position, 1 if it counts as a token of its experts, else 0; None: all computed ones do."""
    weights: Tensor | None = None
    """For every predictor, 1 if its loss counts, else 0; None: all do."""

    def to(self, device: torch.device) -> PlacedBatch:
        """Copy it to a device, without waiting for it."""
        return PlacedBatch._make(
            None if value is None else value.to(device, non_blocking=True) for value in self
        )

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean of those losses that count."""
        if self.weights is None:
            return losses.mean()
        return (losses * self.weights).sum() / self.weights.sum()


def round_up(width: int) -> int:
    """Return the next of eight widths between two powers of two; below 64 the next multiple of 8."""
    step = max(8, 1 << max(0, width.bit_length() - 4))
    return -(-width // step) * step


def collate(rows: Sequence[EncodedRow], pad_token_id: int) -> Batch:
    """Pad rows on the right to the length of the longest, and put them into one batch."""
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    for index, row in enumerate(rows):
        length, ids = len(row.ids), torch.tensor(row.ids)
        input_ids[index, :length] = ids
        attention_mask[index, :length] = 1
        labels[index, row.prompt_length : length] = ids[row.prompt_length :]
        for start, stop in row.gaps:
            labels[index, start:stop] = IGNORE_INDEX
    return Batch(input_ids, attention_mask, labels)


def training_batches(
    rows: Sequence[EncodedRow],
    batch_size: int,
    pad_token_id: int,
    seed: int,
    tokens_per_step: int = 0,
    epochs: float = math.inf,
) -> Iterator[Batch]:
    """Yield the batches of `batch_rows`, padded on the right to the longest row of each."""
    for indices in batch_rows(rows, batch_size, seed, tokens_per_step, epochs):
        yield collate([rows[index] for index in indices], pad_token_id)


def batch_rows(
    rows: Sequence[EncodedRow], batch_size: int, seed: int, tokens_per_step: int, epochs: float
) -> Iterator[list[int]]:
    """Yield the indices of the rows of each batch.

    Each epoch has every row once, in a new order. Batches may be smaller.

    Args:
        rows: the rows to train on.
        batch_size: rows per batch.
        seed: seed of the order.
        tokens_per_step: if not 0, a batch has as many rows as fit in this many tokens, with padding, and at
            least one row; `batch_size` is then ignored.
        epochs: how many; of the last only a part of the batches if it is no whole number.
    """
    rng = random.Random(seed)
    lengths = [len(row.ids) for row in rows]

    def capacity(length: float) -> int:
        return max(1, int(tokens_per_step // length)) if tokens_per_step else batch_size

    window = BATCHES_PER_WINDOW * capacity(sum(lengths) / len(lengths))
    while epochs > 0:
        order = list(range(len(rows)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            alike = sorted(order[start : start + window], key=lengths.__getitem__)
            batches += _cut(alike, lengths, capacity)
        rng.shuffle(batches)
        yield from batches[: math.ceil(min(epochs, 1) * len(batches) - _ROUNDING)]
        epochs -= 1


def _cut(alike: Sequence[int], lengths: Sequence[int], capacity: Callable[[float], int]) -> list[list[int]]:
    """Cut row indices of ascending length into batches; the longest row sets the capacity of its batch."""
    batches: list[list[int]] = [[]]
    for index in alike:
        if len(batches[-1]) >= capacity(lengths[index]):
            batches.append([])
        batches[-1].append(index)
    return batches
