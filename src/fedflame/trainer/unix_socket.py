"""Unix sockets that only their owner may open. Needs only the standard library."""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedflame.errors import UserError

LONGEST_PATH = 103 if sys.platform == "darwin" else 107
"""Longest path of a unix socket, in bytes: macOS has 104 for it, Linux 108, and one of them ends the path."""
_UCRED = struct.Struct("3i")
"""What SO_PEERCRED gives on Linux: process, user, group."""
_XUCRED = struct.Struct("IIh16I")
"""What LOCAL_PEERCRED gives on macOS: version, user, number of groups, groups (sys/ucred.h)."""
_XUCRED_VERSION = 0
_SOL_LOCAL, _LOCAL_PEERCRED = 0, 1  # sys/un.h of macOS; Python does not name the first


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen at a socket that only its owner may open; remove an old socket at this path first.

    At its end a thread that waits for a connection gets an OSError.

    Raises:
        UserError: the path is too long, or the socket cannot be created there.
    """
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UserError(f"socket {path}: longer than the {LONGEST_PATH} letters that the system allows")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_socket(path)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"socket {path}: {error.strerror or error}") from error
    try:
        yield listener
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # whoever waits for a connection learns of the end
        listener.close()
        with suppress(OSError):
            _remove_socket(path)


def _remove_socket(path: Path) -> None:
    """Remove an old socket. Raises OSError where something else is at this path, which stays."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError("what is there is no socket and stays; trainer.socket needs a free path")
        path.unlink()


def same_user(connection: socket.socket) -> bool:
    """Return whether the process at the other end has the same user, according to the kernel."""
    if sys.platform == "darwin":
        version, user, *_ = _XUCRED.unpack(connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size))
        return (version, user) == (_XUCRED_VERSION, os.getuid())
    _, user, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(user) == os.getuid()
