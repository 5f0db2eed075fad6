"""Files of rows as their owners have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.json_lines import write_lines


def numbered(start: str, count: int) -> list[str]:
    return [f"{start} {number}" for number in range(count)]


def write_texts(path: Path, texts: Iterable[str], **columns: str) -> Path:
    """A row for each text, whose answer is the text in capitals; other columns are the same in every row."""
    return write_lines(path, [{"instruction": text, "output": text.upper(), **columns} for text in texts])
