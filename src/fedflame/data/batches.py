"""Make batches of encoded rows: a row in each sequence, padded, or several rows end to end in a sequence.

A row stays a row, however it lies in a batch: |D|, the rows trained on and the activation counts are those
of rows and of their tokens, and the loss of a step is the mean over its labelled tokens. Only `batch_size`
counts sequences: rows, or packed sequences of several rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedflame.data.encoding import EncodedRow
from fedflame.data.packing import best_fit_decreasing

IGNORE_INDEX = -100
"""Label of positions without loss, as in torch's cross entropy."""
_ROUNDING = 1e-9
"""0.7 of ten batches are seven, although 0.7 * 10 is more than 7 in floating point."""
BATCHES_PER_WINDOW = 8
"""Rows are sorted by length in windows of about this many batches: shuffled, but with little padding."""


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: `input_ids`, `attention_mask` and `labels`, each [batch, sequence], on the CPU.

    What a step must know of them is read here, because reading it on a GPU would wait for the GPU.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    """The position of every token in its row, [batch, sequence]: a row begins at each 0, and padding has
    nothing else. None: every sequence is one row."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        if self.position_ids is None:
            return len(self.input_ids)
        return int(((self.position_ids == 0) & self.attention_mask.bool()).sum())

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
            None if self.position_ids is None else pad(self.position_ids, (0, more)),
        )

    def on(self, device: torch.device) -> PlacedBatch:
        """Copy to a device what a step needs, without waiting for it."""
        return PlacedBatch(
            self.input_ids,
            self.attention_mask,
            self.predictors,
            self.targets,
            self.real_tokens,
            position_ids=self.position_ids,
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
            position_ids=batch.position_ids,
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
    position_ids: Tensor | None = None

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
    return replace(collate_packed([[row] for row in rows], pad_token_id), position_ids=None)


def collate_packed(sequences: Sequence[Sequence[EncodedRow]], pad_token_id: int) -> Batch:
    """Lay the rows of each sequence end to end, pad on the right, and put the sequences into one batch.

    The first token of a row has no label, since nothing of its row predicts it.
    """
    size = len(sequences), max(sum(len(row.ids) for row in sequence) for sequence in sequences)
    input_ids = torch.full(size, pad_token_id)
    attention_mask, position_ids = torch.zeros(2, *size, dtype=torch.int64)
    labels = torch.full(size, IGNORE_INDEX)
    for index, sequence in enumerate(sequences):
        begin = 0
        for row in sequence:
            end, ids = begin + len(row.ids), torch.tensor(row.ids)
            input_ids[index, begin:end] = ids
            attention_mask[index, begin:end] = 1
            position_ids[index, begin:end] = torch.arange(len(ids))
            answer = max(1, row.prompt_length)
            labels[index, begin + answer : end] = ids[answer:]
            for start, stop in row.gaps:
                labels[index, begin + start : begin + stop] = IGNORE_INDEX
            begin = end
    return Batch(input_ids, attention_mask, labels, position_ids)


def training_batches(
    rows: Sequence[EncodedRow],
    batch_size: int,
    pad_token_id: int,
    seed: int,
    tokens_per_step: int = 0,
    packed_length: int = 0,
    padding_free: bool = False,
    epochs: float = math.inf,
) -> Iterator[Batch]:
    """Yield the batches of `batch_rows`, padded on the right to the longest sequence of each.

    With `padding_free` the rows of a batch lie end to end in one sequence. The batches have the same rows as
    without.
    """
    for batch in batch_rows(rows, batch_size, seed, tokens_per_step, packed_length, epochs):
        members = [[rows[row] for row in sequence] for sequence in batch]
        if padding_free:
            members = [[row for sequence in members for row in sequence]]
        if packed_length or padding_free:
            yield collate_packed(members, pad_token_id)
        else:
            yield collate([row for (row,) in members], pad_token_id)


def batch_rows(
    rows: Sequence[EncodedRow],
    batch_size: int,
    seed: int,
    tokens_per_step: int,
    packed_length: int,
    epochs: float,
) -> Iterator[list[list[int]]]:
    """Yield the sequences of each batch, each the indices of its rows.

    Each epoch has every row once, in a new order. Batches may be smaller.

    Args:
        rows: the rows to train on.
        batch_size: sequences per batch: rows, or packed sequences.
        seed: seed of the order.
        tokens_per_step: if not 0, a batch has as many sequences as fit in this many tokens, with padding, and
            at least one; `batch_size` is then ignored.
        packed_length: if not 0, the rows of each epoch are packed anew into sequences of at most so many
            tokens; a longer row has one of its own.
        epochs: how many; of the last only a part of the batches if it is no whole number.
    """
    rng = random.Random(seed)
    lengths = [len(row.ids) for row in rows]

    def capacity(length: float) -> int:
        return max(1, int(tokens_per_step // length)) if tokens_per_step else batch_size

    while epochs > 0:
        sequences = _sequences(lengths, packed_length, rng)
        totals = [sum(lengths[row] for row in sequence) for sequence in sequences]
        window = BATCHES_PER_WINDOW * capacity(sum(totals) / len(totals))
        batches: list[list[int]] = []
        for start in range(0, len(sequences), window):
            alike = sorted(range(len(sequences))[start : start + window], key=totals.__getitem__)
            batches += _cut(alike, totals, capacity)
        rng.shuffle(batches)
        for batch in batches[: math.ceil(min(epochs, 1) * len(batches) - _ROUNDING)]:
            yield [sequences[index] for index in batch]
        epochs -= 1


def _sequences(lengths: Sequence[int], packed_length: int, rng: random.Random) -> list[list[int]]:
    """Return the row indices of each sequence of an epoch, in a random order."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if not packed_length:
        return [[row] for row in order]
    packed = best_fit_decreasing([lengths[row] for row in order], packed_length)
    rng.shuffle(packed)
    return [[order[index] for index in sequence] for sequence in packed]


def _cut(alike: Sequence[int], lengths: Sequence[int], capacity: Callable[[float], int]) -> list[list[int]]:
    """Cut indices of ascending length into batches; the longest sequence sets the capacity of its batch."""
    batches: list[list[int]] = [[]]
    for index in alike:
        if len(batches[-1]) >= capacity(lengths[index]):
            batches.append([])
        batches[-1].append(index)
    return batches
