"""The rows of each client as files, one per site: an experiment goes from one machine to many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedflame.atomic_file import write_atomically
from fedflame.data.federation import Federation
from fedflame.data.instructions import Instruction
from fedflame.errors import UserError


def write_parts(federation: Federation, afforded: Sequence[int], folder: Path, console: Console) -> None:
    """Write `client-0.jsonl` and so on, with the rows and their order as a run on one machine has them.

    Raises:
        UserError: the folder has something in it, or cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; give a folder that is empty or not there")
    for client, part in enumerate(federation.parts):
        path = folder / f"client-{client}.jsonl"
        lines = [_line(federation.training[index]) for index in part]
        write_atomically(path, "".join(lines).encode())
        console.print(f"{path}: {len(part):,} rows, k = {afforded[client]}", soft_wrap=True)


def _line(row: Instruction) -> str:
    """The row under Dolly's names, which every reader of instructions here recognises."""
    columns = {
        "instruction": row.instruction,
        "context": row.context,
        "response": row.response,
        "category": row.category,
    }
    return json.dumps(columns, ensure_ascii=False) + "\n"
