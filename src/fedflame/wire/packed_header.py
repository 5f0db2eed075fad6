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
        entries = json.loads(bytes(buffer[SIZE_BYTES : header_size(buffer)]))
        return read_header(entries["__metadata__"][KEY])
    except (KeyError, TypeError, AttributeError, RecursionError, InvalidMessage) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
