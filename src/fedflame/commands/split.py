"""The rows of each client as files, one per site: an experiment goes from one machine to many."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedflame.atomic_file import write_atomically
from fedflame.commands.progress import say_line
from fedflame.data.conversations import as_fields
from fedflame.data.federation import Federation
from fedflame.errors import UserError


def write_parts(federation: Federation, afforded: Sequence[int], folder: Path, console: Console) -> None:
    """Write `client-0.jsonl` and so on, with the rows and their order as a run on one machine has them.

    The rows that clients score go into files of the same names in `test`, if clients are asked to score.

    Raises:
        UserError: the folder has something in it, or cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give a folder that is empty or not there")
    for line in federation.columns:
        say_line(console, line)
    fields = as_fields(federation.training)
    for client, part in enumerate(federation.parts):
        path = folder / f"client-{client}.jsonl"
        _write_rows(path, [fields[index] for index in part])
        say_line(console, f"{path}: {len(part):,} rows, k = {afforded[client]}")
    for client, rows in enumerate(federation.tests):
        path = folder / "test" / f"client-{client}.jsonl"
        _write_rows(path, as_fields(rows))
        say_line(console, f"{path}: {len(rows):,} rows to score")


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines).encode())
