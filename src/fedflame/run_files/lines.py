"""The lines of metrics.jsonl: one JSON object per line, each with a checksum of itself and all before it.

So a reader notices a line that is damaged, lost, moved or put in. How many bytes there must be at least, the
checkpoint says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflame.checked_json import CHECKSUM, checksum
from fedflame.errors import UserError
from fedflame.json_text import to_text
from fedflame.reading import LONGEST_JSON, parse_object
from fedflame.run_files import ADVICE

FILE_NAME = "metrics.jsonl"
_END = re.compile(rb', "' + CHECKSUM.encode() + rb'": "([0-9a-f]{16})"\}')


@dataclass(frozen=True)
class Place:
    """How far a file was read: its bytes, its lines, and the checksum after them."""

    size: int = 0
    lines: int = 0
    checksum: str = ""


START = Place()


def line_of(record: Mapping[str, Any], before: str) -> tuple[bytes, str]:
    """Return the line of a record and its checksum. `before` is the checksum of the line before, or empty."""
    body = to_text(record).encode()
    mine = checksum(before.encode() + body)
    return body[:-1] + f', "{CHECKSUM}": "{mine}"}}\n'.encode(), mine


def read_lines(
    path: Path, kept: int = 0, most: int | None = None, advice: str = ADVICE
) -> Iterator[dict[str, Any]]:
    """Yield the records of a file. What follows the last newline is a line that was still being written.

    Args:
        path: the file.
        kept: the bytes of it that a checkpoint vouches for.
        most: the bytes of it that are read, which must end with a line; None for all.
        advice: what to do where it cannot be used.

    Raises:
        UserError: it is missing or shorter than `kept`, or a line is damaged.
    """
    for record, _ in _checked(path, kept, most, advice):
        yield record


def read_on(path: Path, place: Place, kept: int) -> tuple[list[dict[str, Any]], Place]:
    """Return the records from a place to the first `kept` bytes, and the place after them.

    Raises UserError as `read_lines` does.
    """
    found = list(_checked(path, kept, kept, ADVICE, place))
    records = [record for record, _ in found]
    after = found[-1][1] if found else place.checksum
    return records, Place(kept, place.lines + len(found), after)


def last_checksum(path: Path, kept: int) -> str:
    """Return the checksum after the first `kept` bytes. Raises UserError as `read_lines` does."""
    checksums = [mine for _, mine in _checked(path, kept, kept, ADVICE)]
    return checksums[-1] if checksums else ""


def _checked(
    path: Path, kept: int, most: int | None, advice: str, place: Place = START
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the records from a place to the first `most` bytes, or to the end, each with its checksum."""
    size, before = place.size, place.checksum
    for number, line in enumerate(_lines(path, advice, size), start=place.lines + 1):
        if most is not None and size >= most:
            break
        if not line.endswith(b"\n") and _opened(line[:-1], before) is None:
            break
        found = _opened(line.removesuffix(b"\n"), before) if line.endswith(b"\n") else None
        if found is None:
            raise UserError(f"{path}, line {number}: damaged or edited; {advice}")
        size += len(line)
        before = found[1]
        yield found
    if size < kept or (most is not None and size > most):
        raise UserError(f"{path}: {size:,} bytes of lines; its checkpoint needs {kept:,}; {advice}")


def _lines(path: Path, advice: str, start: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while line := file.readline(LONGEST_JSON):
                yield line
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {advice}") from error


def _opened(line: bytes, before: str) -> tuple[dict[str, Any], str] | None:
    """Return the record of a line and its checksum; None where it is damaged."""
    end = _END.search(line, max(0, len(line) - 64))
    if end is None or end.end() != len(line):
        return None
    body, stated = line[: end.start()] + b"}", end[1].decode()
    if checksum(before.encode() + body) != stated:
        return None
    try:
        return parse_object(body), stated
    except ValueError:
        return None
