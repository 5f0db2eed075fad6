"""What a stage finds: tables of rows, and what failed, in a file that is complete after every row."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fedflame.atomic_file import write_atomically
from fedflame.json_text import to_text


class Findings:
    """The findings of one stage."""

    def __init__(self, file: Path) -> None:
        self._file, self._start = file, time.monotonic()
        self.begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.failures: list[dict[str, str]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def add(self, table: str, **row: Any) -> None:
        self.tables.setdefault(table, []).append(row)
        self.write()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record whatever fails in the block: it is a finding, and what comes after it is measured."""
        try:
            yield
            return
        except Exception as error:
            text = "".join(traceback.format_exception(error, limit=-12))
            self.failures.append(failure(what, f"{type(error).__name__}: {error}", text))
            self.write()
        gc.collect()  # the frames of the error are gone: what they held is free
        torch.cuda.empty_cache()

    def write(self) -> None:
        seconds = time.monotonic() - self._start
        found = {"begun": self.begun, "seconds": seconds, "failures": self.failures, "tables": self.tables}
        write_atomically(self._file, to_text(found, indent=1).encode())


def failure(what: str, message: str, trace: str = "") -> dict[str, str]:
    return {"what": what, "message": message, "traceback": trace}
