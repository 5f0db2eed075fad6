"""Prompt template, tokenisation with response-only labels, and padded batches of similar length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedflame.data.instructions import Instruction
from fedflame.errors import UserError

RESPONSE_MARKER = "\nResponse:"
IGNORE_INDEX = -100
"""Label of positions without loss, as in torch's cross entropy."""
BATCHES_PER_WINDOW = 8
"""Rows are sorted by length within windows of about so many batches: little padding, still shuffled."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of prompt and response; the loss starts at `prompt_length`, in tokens."""

    ids: list[int]
    prompt_length: int
    truncated: bool


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


def format_prompt(row: Instruction) -> str:
    """The prompt without the response marker; the response follows `RESPONSE_MARKER` and a space."""
    context = f"\nInput: {row.context}" if row.context else ""
    return f"Instruction: {row.instruction}{context}"


def encode(row: Instruction, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRow:
    """Tokenise one row into at most `max_length` tokens.

    A row that is too long loses the end of its response beyond half of `max_length`, then the end of
    its prompt (the context comes last there); the marker always stays.
    """
    marker = _ids(tokenizer, RESPONSE_MARKER)
    response = [*_ids(tokenizer, f" {row.response}"), _end_token(tokenizer)]
    prompt = _ids(tokenizer, format_prompt(row))
    total = len(prompt) + len(marker) + len(response)
    if total > max_length:
        room = max(max_length - len(prompt) - len(marker), max_length // 2)
        response = response[: min(room, max_length - len(marker))]
        prompt = prompt[: max(0, max_length - len(marker) - len(response))]
    ids = prompt + marker + response
    return EncodedRow(ids, len(prompt) + len(marker), total > max_length)


def encode_prompt(row: Instruction, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """The prompt with its marker, as generation starts from it; cut to `max_length`, the marker stays."""
    marker = _ids(tokenizer, RESPONSE_MARKER)
    return _ids(tokenizer, format_prompt(row))[: max(0, max_length - len(marker))] + marker


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


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; models without one are padded by their end token, which the mask hides."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _end_token(tokenizer)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token; responses need one to end")
    return int(tokenizer.eos_token_id)
