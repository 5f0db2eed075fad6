"""The prompt template, and rows as token ids, of which only the response has labels. Needs no torch."""

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
    """Token ids of prompt and response. The first `prompt_length` tokens have no loss."""

    ids: list[int]
    prompt_length: int
    truncated: bool


def format_prompt(row: Instruction) -> str:
    """Return the prompt without `RESPONSE_MARKER`; marker, space and response follow it."""
    context = f"\nInput: {row.context}" if row.context else ""
    return f"Instruction: {row.instruction}{context}"


def encode_rows(
    rows: Sequence[Instruction], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[EncodedRow]:
    """Tokenise rows into at most `max_length` tokens each.

    If a row is too long, the end of its response is cut first, down to half of `max_length`. Then the end
    of the prompt is cut, where the context is. The marker always stays.

    Raises:
        UserError: the tokenizer has no eos_token.
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
    """Return prompt and marker, from which generation starts. The prompt is cut to fit `max_length`."""
    prompt, marker = _ids(tokenizer, [format_prompt(row), RESPONSE_MARKER])
    return prompt[: max(0, max_length - len(marker))] + marker


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the padding id, or the end token if there is none; the attention mask hides it."""
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
