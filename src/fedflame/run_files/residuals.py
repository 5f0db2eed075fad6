"""The files of what clients owe (`training.error_feedback`): one sealed file per client and round."""

from __future__ import annotations

from pathlib import Path

from fedflame.atomic_file import write_atomically
from fedflame.errors import InvalidMessage, UserError
from fedflame.wire.envelope import Bytes
from fedflame.wire.frame import seal, unseal

FORMAT_VERSION = 1
_KIND, _SUFFIX = "residual", ".sealed"


def residual_path(folder: Path, client: int, round_number: int) -> Path:
    """Return the path of what a client owes after a round."""
    return folder / str(client) / f"{round_number}{_SUFFIX}"


def residual_rounds(folder: Path, client: int) -> list[int]:
    """Return the rounds after which something is kept for a client, in ascending order."""
    files = (folder / str(client)).glob(f"*{_SUFFIX}")
    return sorted(int(path.stem) for path in files if path.stem.isdecimal())


def write_residual(path: Path, body: bytes) -> None:
    """Write a residual atomically. Raises UserError if the disk is full."""
    write_atomically(path, seal(body, FORMAT_VERSION))


def read_residual(path: Path) -> Bytes:
    """Return the body of a residual, whose seal is checked.

    Raises:
        UserError: it is missing, truncated, damaged, foreign or of another version.
    """
    try:
        return unseal(path.read_bytes(), FORMAT_VERSION, _KIND)
    except FileNotFoundError as error:
        owed = f"what client {path.parent.name} owes after round {path.name.removesuffix(_SUFFIX)}"
        raise UserError(f"{path}: missing: {owed}; put back a copy of the file") from error
    except (OSError, InvalidMessage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read ({reason}); put back a copy of the file") from error
