"""Read the JSON objects that stand before bodies and in messages. Uses only the standard library."""

from __future__ import annotations

import json
from typing import Any

from fedflame.errors import InvalidMessage

DEEPEST = 8
"""Levels of lists and objects in each other; with more, printing or writing them could fail."""


def read_header(text: bytes | str) -> dict[str, Any]:
    """Return the object. Raises InvalidMessage if it is no JSON, no object, or nests too deep."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise InvalidMessage("a header that is no JSON object")
    if _is_deeper(header, DEEPEST):
        raise InvalidMessage(f"a header of more than {DEEPEST} levels")
    return header


def _is_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(part, levels - 1) for part in inner)
