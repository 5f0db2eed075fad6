"""Write files atomically: after a crash a file has either its old or its new content, complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedflame.errors import UserError


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file, fsync it, rename it to `path`, and fsync the folder.

    Raises:
        UserError: the disk is full or not writable. The old file at `path` is unchanged.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # there may be no such folder, or a folder in its place
            partial.unlink()
        raise UserError(f"{path}: cannot write {len(content)} bytes: {error.strerror}") from error


def write_missing(texts: Mapping[Path, str]) -> None:
    """Write the files that do not exist yet. Raises UserError as `write_atomically` does."""
    for path, text in texts.items():
        if not path.exists():
            write_atomically(path, text.encode())


def kept_secret(path: Path, size: int) -> bytes:
    """Return the random bytes of a file that only this user can read; it is made if there is none.

    Raises:
        UserError: the file cannot be read or written, or has another size.
    """
    try:
        if not path.exists():
            _write_secret(path, os.urandom(size))
        secret = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read or written: {error.strerror}") from error
    if len(secret) != size:
        raise UserError(
            f"{path}: has {len(secret)} bytes; a secret has {size}. Remove it, and a new one is made"
        )
    return secret


def _write_secret(path: Path, secret: bytes) -> None:
    """Write a secret for this user alone, whole before it has its name. Raises OSError.

    A secret that a crash lost would be replaced by another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, secret)
        os.fsync(file)
        with suppress(FileExistsError):  # another process was faster
            os.link(new, path)
        fsync_folder(path.parent)
    finally:
        os.close(file)
        new.unlink()


def fsync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
