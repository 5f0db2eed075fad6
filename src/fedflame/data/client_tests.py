"""The rows that each client is scored on, which nobody trains on and which never leave it. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from fedflame.data.conversations import Conversation
from fedflame.data.encoder import Encoder
from fedflame.data.encoding import EncodedPrompt, EncodedRow, encode_prompts, encode_rows
from fedflame.data.rows import SkippedRow


def split_test(rows: Sequence[Conversation], test_size: float, seed: int) -> tuple[list[int], list[int]]:
    """Split the rows of a client: return the indices of those to train on and of those to score.

    What a row says gives it a place from 0 to 1, and the rows below `test_size` are scored. So a row keeps
    its side when others are added, and copies of it are on one side at all clients. Of rows of which at least
    two differ, one at least is scored and one trained on. Of others, none is scored.

    Args:
        rows: the rows of one client.
        test_size: the share to score, about; between 0 and 1.
        seed: of the places.
    """
    places = [_place(row, seed) for row in rows]
    if len(set(places)) < 2:
        return list(range(len(rows))), []
    first, last = min(places), max(places)
    scored = [(place < test_size or place == first) and place != last for place in places]
    return (
        [index for index, is_scored in enumerate(scored) if not is_scored],
        [index for index, is_scored in enumerate(scored) if is_scored],
    )


def _place(row: Conversation, seed: int) -> float:
    turns, tools = row.content
    text = json.dumps([seed, [astuple(turn) for turn in turns], tools])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


@dataclass(frozen=True)
class EncodedTests:
    """The rows that a client is scored on, as tokens."""

    rows: list[Conversation]
    encoded: list[EncodedRow]
    """In the order of `rows`."""
    prompts: list[EncodedPrompt]
    """What answers are generated from, in the order of `rows`; empty if none are."""


def encode_tests(
    rows: Sequence[Conversation], encoder: Encoder, most_prompt_tokens: int | None, generate: bool
) -> tuple[EncodedTests, list[SkippedRow]]:
    """Encode the rows that a client is scored on; return those that cannot be used beside them.

    Args:
        rows: the rows of one client.
        encoder: how they become tokens.
        most_prompt_tokens: the most tokens of a prompt; None for no limit.
        generate: whether answers will be generated.
    """
    usable: list[tuple[Conversation, EncodedRow]] = []
    skipped = []
    for row, encoded in zip(rows, encode_rows(rows, encoder), strict=True):
        if isinstance(encoded, str):
            skipped.append(SkippedRow(row.where or "a generated row", encoded))
        else:
            usable.append((row, encoded))
    kept = [row for row, _ in usable]
    prompts = encode_prompts(kept, encoder, most_prompt_tokens) if generate else []
    return EncodedTests(kept, [encoded for _, encoded in usable], prompts), skipped
