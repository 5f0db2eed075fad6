"""Tokens of single characters, and what of an encoded row has loss."""

from __future__ import annotations

from tests.tiny_models import PAD, character_tokenizer

from fedflame.data.batches import IGNORE_INDEX, collate
from fedflame.data.encoding import EncodedRow

TOKENIZER = character_tokenizer()


def text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def labelled(row: EncodedRow) -> list[int]:
    return [id for id in collate([row], PAD).labels[0].tolist() if id != IGNORE_INDEX]
