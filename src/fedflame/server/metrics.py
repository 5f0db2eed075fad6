"""metrics.jsonl: the events of a run, one JSON object per line. `run_files.lines` says what a line is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedflame.errors import UserError
from fedflame.run_files.lines import last_checksum, line_of

OnEvent = Callable[[dict[str, Any]], None]
"""Called with each object after it is written to metrics.jsonl."""


class MetricsFile:
    """Appends to metrics.jsonl, one JSON object per line. The checkpoint stores its `size`."""

    def __init__(self, path: Path, size: int = 0, on_event: OnEvent | None = None) -> None:
        """Open for appending after the first `size` bytes; the rest of the file is cut off.

        Raises:
            UserError: the file cannot be opened, or its first `size` bytes are not whole lines of a run.
        """
        self._path, self._on_event = path, on_event
        self._checksum = last_checksum(path, size) if size else ""
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
        """Append one object and pass it to `on_event`. Raises UserError if the disk is full."""
        record = {"event": event, **values}
        line, self._checksum = line_of(record, self._checksum)
        try:
            self._file.write(line)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error
        if self._on_event is not None:
            self._on_event(record)

    def sync(self) -> int:
        """Force the lines to disk and return `size`. Raises UserError if the disk is full."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error
        return self.size

    def cut(self, size: int) -> None:
        """Cut off what was written after the first `size` bytes. Raises UserError if the disk fails."""
        self._checksum = last_checksum(self._path, size) if size else ""
        try:
            self._file.truncate(size)
            self._file.seek(size)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()
