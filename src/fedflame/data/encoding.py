"""The prompt template, and rows as token ids whose labels are the response alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedflame.data.instructions import Instruction
from fedflame.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSE_MARKER = "\nResponse:"


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of prompt and response; the loss starts at `prompt_length`, in tokens."""

    ids: list[int]
    prompt_length: int
    truncated: bool


def format_prompt(row: Instruction) -> str:
    """The prompt without the response marker; the response follows `RESPONSE_MARKER` and a space."""
    context = f"\nInput: {row.context}" if row.context else ""
    return f"Instruction: {row.instruction}{context}"


def encode_rows(
    rows: Sequence[Instruction], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedRow]:
    """Tokenise rows into at most `max_length` tokens each.

    A row that is too long loses the end of its response beyond half of `max_length`, then the end of
    its prompt (the context comes last there); the marker always stays.
    """
    if not rows:
        return []
    (marker,) = _ids(tokenizer, [RESPONSE_MARKER])
    end = _end_token(tokenizer)
    prompts = _ids(tokenizer, [format_prompt(row) for row in rows])
    responses = _ids(tokenizer, [f" {row.response}" for row in rows])
    pairs = zip(prompts, responses, strict=True)
    return [_fitted(prompt, marker, [*response, end], max_length) for prompt, response in pairs]


def _fitted(prompt: list[int], marker: list[int], response: list[int], max_length: int) -> EncodedRow:
    total = len(prompt) + len(marker) + len(response)
    if total > max_length:
        room = max(max_length - len(prompt) - len(marker), max_length // 2)
        response = response[: min(room, max_length - len(marker))]
        prompt = prompt[: max(0, max_length - len(marker) - len(response))]
    return EncodedRow(prompt + marker + response, len(prompt) + len(marker), total > max_length)


def encode(row: Instruction, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRow:
    """Tokenise one row; see `encode_rows`."""
    return encode_rows([row], tokenizer, max_length)[0]


def encode_prompt(row: Instruction, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """The prompt with its marker, as generation starts from it; cut to `max_length`, the marker stays."""
    prompt, marker = _ids(tokenizer, [format_prompt(row), RESPONSE_MARKER])
    return prompt[: max(0, max_length - len(marker))] + marker


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; models without one are padded by their end token, which the mask hides."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _end_token(tokenizer)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """All texts in one call: most of the time for one text alone is the way to the tokenizer."""
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token; responses need one to end")
    return int(tokenizer.eos_token_id)
