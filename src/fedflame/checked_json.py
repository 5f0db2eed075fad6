"""JSON files that hold a checksum of themselves, so that a reader notices damage, also in a number.

The checksum detects damage, not forgery. It is of the values, not of the bytes: a file that is laid out anew
is the same file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedflame.atomic_file import write_atomically
from fedflame.errors import UserError
from fedflame.json_text import to_text
from fedflame.reading import read_object

CHECKSUM = "checksum"


def checksum(content: bytes) -> str:
    """Return the checksum of bytes, in hexadecimal (BLAKE2b, 64 bits)."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def write_checked(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object with its checksum. Raises UserError as `write_atomically` does."""
    plain = json.loads(to_text(values))
    text = json.dumps(plain | {CHECKSUM: _checksum_of(plain)}, indent=1)
    write_atomically(path, f"{text}\n".encode())


def read_checked(path: Path, advice: str) -> dict[str, Any]:
    """Return an object that `write_checked` wrote, without its checksum.

    Args:
        path: the file.
        advice: what to do where it cannot be used.

    Raises:
        UserError: it is missing, is no JSON object, has no checksum, or another one than its own.
    """
    try:
        values = read_object(path)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error
    stated = values.pop(CHECKSUM, None)
    if stated is None:
        raise UserError(f"{path}: has no checksum: damaged, edited, or made by an earlier fedflame; {advice}")
    if stated != _checksum_of(json.loads(to_text(values))):
        raise UserError(f"{path}: its checksum is wrong: damaged or edited; {advice}")
    return values


def _checksum_of(values: Mapping[str, Any]) -> str:
    return checksum(json.dumps(values, sort_keys=True).encode())
