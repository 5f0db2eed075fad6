"""The JSON header of a packed buffer, which `buffer` writes, read without its tensors and without torch."""

from __future__ import annotations

import json
from typing import Any

from fedflame.errors import InvalidMessage
from fedflame.wire.envelope import Bytes
from fedflame.wire.header import read_header

KEY = "fedflame"
LONGEST = 64 << 20
"""In bytes: more than the names and shapes of any model's tensors."""
SIZE_BYTES = 8


def header_size(start: Bytes) -> int:
    """Return how many bytes from its start a buffer's header needs, of its first `SIZE_BYTES`.

    Raises:
        ValueError: more than a header has.
    """
    size = int.from_bytes(start[:SIZE_BYTES], "little")
    if len(start) < SIZE_BYTES or size > LONGEST:
        raise ValueError("it does not begin as a packed buffer does")
    return SIZE_BYTES + size


def read_packed_header(buffer: Bytes) -> dict[str, Any]:
    """Return the header that `pack` was given. Raises ValueError if `pack` did not make the buffer."""
    try:
        return read_header(_entries(buffer)["__metadata__"][KEY])
    except (KeyError, TypeError, InvalidMessage) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def packed_size(start: Bytes) -> int:
    """Return how many bytes a whole buffer has, of its start with the header.

    Raises:
        ValueError: `pack` did not make the buffer.
    """
    try:
        tensors = [entry for name, entry in _entries(start).items() if name != "__metadata__"]
        return header_size(start) + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _entries(buffer: Bytes) -> Any:
    """Return the JSON with the place of each tensor. Raises ValueError if there is none."""
    try:
        return json.loads(bytes(buffer[SIZE_BYTES : header_size(buffer)]))
    except RecursionError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
