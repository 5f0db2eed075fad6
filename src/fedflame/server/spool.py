"""Updates that wait on the disk, so that one is in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from fedflame.errors import UserError
from fedflame.messages import NOTHING, Adapter, ClientUpdate
from fedflame.wire.buffer import pack, unpack


class Spool:
    """A file of updates in a folder. It has no name, so that the system removes it also after a kill."""

    def __init__(self, folder: Path) -> None:
        """Open the file. Raises UserError if the folder is not writable."""
        self._folder = folder
        self._waiting: list[tuple[ClientUpdate, list[str], int]] = []
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (`__exit__` closes it)
        except OSError as error:
            raise self._failure(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what a full disk could not take has been reported
            self._file.close()

    def put(self, update: ClientUpdate) -> ClientUpdate:
        """Write an update and return it without its delta. Raises UserError if the disk is full."""
        tensors = update.delta.tensors()
        buffer = pack(tensors, {})
        try:
            self._file.write(buffer)
        except OSError as error:
            raise self._failure(error) from error
        without = replace(update, delta=NOTHING)
        self._waiting.append((without, list(tensors), len(buffer)))
        return without

    def __iter__(self) -> Iterator[ClientUpdate]:
        """Yield the updates, bit for bit and with the order of their names, as they were put."""
        try:
            self._file.seek(0)
        except OSError as error:
            raise self._failure(error) from error
        for update, names, length in self._waiting:
            tensors, _ = unpack(self._file.read(length))
            yield replace(update, delta=Adapter.from_tensors({name: tensors[name] for name in names}))

    def _failure(self, error: OSError) -> UserError:
        return UserError(f"{self._folder}: cannot hold the updates of a round: {error.strerror}")
