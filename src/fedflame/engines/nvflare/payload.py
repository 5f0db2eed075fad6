"""Put an envelope into nvflare messages, as arrays of bytes that nvflare streams one by one."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from nvflare.apis.shareable import Shareable

from fedflame.wire.envelope import Bytes

TASK = "fedflame"
_KEY = "envelope"
_LARGEST = 8_000_000
"""Largest array, in bytes. Nvflare holds several copies of the array that it sends, so it must be small."""


def to_shareable(pieces: Iterable[Bytes]) -> Shareable:
    """Put the pieces of an envelope into a Shareable, in arrays of at most `_LARGEST` bytes."""
    shareable = Shareable()
    shareable[_KEY] = [
        whole[start : start + _LARGEST]
        for whole in (np.frombuffer(piece, dtype=np.uint8) for piece in pieces if piece)
        for start in range(0, len(whole), _LARGEST)
    ]
    return shareable


def from_shareable(shareable: Shareable) -> list[Bytes]:
    """Return the bytes of the envelope in pieces; an empty list if the Shareable has none."""
    arrays = shareable.get(_KEY)
    if not isinstance(arrays, list) or not all(_is_bytes(array) for array in arrays):
        return []
    return [array.data for array in arrays]


def _is_bytes(array: object) -> bool:
    return isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 1
