"""What a run leaves for others to read: metrics.jsonl, and progress on the console."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedflame.errors import UserError


class MetricsFile:
    """Append-only metrics.jsonl, one JSON object per line; `size` goes into the checkpoint."""

    def __init__(self, path: Path, size: int = 0) -> None:
        """Open for appending after the first `size` bytes; what follows them is cut off."""
        self._path = path
        try:
            self._file = path.open("r+b" if size else "wb", buffering=0)
            self._file.truncate(size)
            self._file.seek(size)
        except OSError as error:
            raise UserError(f"{path}: cannot open: {error.strerror}") from error

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def log(self, event: str, **values: Any) -> None:
        """Append one object."""
        try:
            self._file.write(json.dumps({"event": event, **values}).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error

    def sync(self) -> int:
        """Force the lines to disk and return `size`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error
        return self.size

    def close(self) -> None:
        self._file.close()


class Reporter(Protocol):
    """Where progress goes."""

    def message(self, text: str) -> None:
        """Say one line."""

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        """A client begins its steps."""

    def end_client(self, name: str) -> None:
        """A client has answered."""

    def step(self, tokens: int) -> None:
        """One optimizer step over so many tokens is done."""


class LineReporter:
    """Plain lines, for logs and pipes: messages only, no bar."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        pass

    def end_client(self, name: str) -> None:
        pass

    def step(self, tokens: int) -> None:
        pass


class BarReporter(LineReporter):
    """A live bar over all optimizer steps of the run, with the clients at work and their tokens/s."""

    def __init__(self, console: Console, progress: Progress, total_steps: int) -> None:
        super().__init__(console)
        self._progress = progress
        self._task = progress.add_task("", total=total_steps, clients="", speed="")
        self._working: dict[str, str] = {}
        self._tokens, self._start = 0, time.monotonic()

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        if not self._working:
            self._tokens, self._start = 0, time.monotonic()
        self._working[name] = f"{name} (k={active_experts})"
        text = f"round {round_number}: {', '.join(self._working.values())}"
        self._progress.update(self._task, clients=text)

    def end_client(self, name: str) -> None:
        del self._working[name]

    def step(self, tokens: int) -> None:
        self._tokens += tokens
        speed = self._tokens / (time.monotonic() - self._start)
        self._progress.update(self._task, advance=1, speed=f"{speed:,.0f} tokens/s")


@contextmanager
def reporter(console: Console, total_steps: int) -> Iterator[Reporter]:
    """A live bar on a terminal, plain lines otherwise."""
    if not console.is_terminal:
        yield LineReporter(console)
        return
    columns = (
        TextColumn("{task.fields[clients]}"),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield BarReporter(console, progress, total_steps)
