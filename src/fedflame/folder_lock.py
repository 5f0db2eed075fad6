"""One process at a time in a folder: the system releases the lock with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from fedflame.errors import UserError
from fedflame.json_text import to_text
from fedflame.reading import read_object


@contextmanager
def sole_user(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the lock within the block. Its file, and its folder where that was not there, go at the end.

    Args:
        lock: the lock's file.
        refusal: what to say where another process holds it; who holds it is added.

    Raises:
        UserError: another process holds it, or the file cannot be made.
    """
    made = not lock.parent.exists()
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(lock)
    except OSError as error:
        raise UserError(f"{lock}: cannot be locked: {error.strerror}") from error
    if file is None:
        raise UserError(f"{refusal} ({_holder(lock)})")
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()  # while it is held: whoever opened it before finds out in `_taken`
                if made:
                    lock.parent.rmdir()  # fails where something was written


def refuse_if_used(lock: Path, refusal: str) -> None:
    """Raise UserError, as `sole_user` does, where another process holds the lock. Changes nothing."""
    try:
        with lock.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{refusal} ({_holder(lock)})") from error
    except OSError:  # no such file, or none that can be locked, which `sole_user` will say
        return


def holder(lock: Path) -> str:
    """Return who holds the lock, as far as its file tells; empty for nobody.

    The lock itself is left alone, so that whoever looks is in nobody's way.
    """
    try:
        values = read_object(lock)
        here = values["host"] == socket.gethostname()
        return "" if here and not _is_alive(values["process"]) else _in_words(values)
    except (UserError, KeyError):
        return ""


def _is_alive(process: object) -> bool:
    if type(process) is not int or process < 1:
        return False
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _taken(lock: Path) -> TextIO | None:
    """Return the lock's open file; None where another process holds it."""
    while True:
        file = lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, lock):
                file.truncate(0)
                file.write(to_text(_this_process()))
                file.flush()
                return file
            file.close()  # the holder before removed it after we had opened it
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, object]:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(lock: Path) -> str:
    try:
        return _in_words(read_object(lock))
    except (UserError, KeyError):  # it has just taken it
        return "a process that has just begun"


def _in_words(values: dict[str, Any]) -> str:
    return f"process {values['process']} on {values['host']} since {values['since']}"
