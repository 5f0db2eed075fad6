"""The files that hold the rows of one client each."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence

from fedflame.errors import UserError

MOST_FILES = 100_000


def client_files(patterns: Sequence[str], key: str = "data.client_files") -> tuple[str, ...]:
    """Return the files of the patterns in this key, in client order.

    The files of a pattern come in the order of their names, with numbers in them as numbers: client-2 comes
    before client-10. Patterns come in the given order.

    Raises:
        UserError: no file has such a name, a file comes twice, or there are too many.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        files = sorted(glob.glob(pattern, recursive=True), key=_numbers_as_numbers)
        if not files:
            raise UserError(f"{key} = {pattern!r}: no such file")
        for file in files:
            if file in found:
                raise UserError(f"{key}: {file} is in {found[file]!r} and in {pattern!r}")
            found[file] = pattern
    if len(found) > MOST_FILES:
        raise UserError(f"{key}: {len(found):,} files; at most {MOST_FILES:,} are possible")
    return tuple(found)


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    """Return what names are sorted by."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]
