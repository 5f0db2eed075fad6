"""Files with a JSON value on each line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def write_lines(path: Path, values: Iterable[object]) -> Path:
    """The file, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path
