"""Unix sockets: whose process is at the other end, on Linux and on macOS, and how long a path may be."""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

import pytest

from fedflame.errors import UserError
from fedflame.trainer.unix_socket import LONGEST_PATH, listening, same_user


def test_the_kernel_names_the_user_of_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.sock"
    with listening(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
        connection, _ = listener.accept()
        with connection:
            assert same_user(connection)
            monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
            assert not same_user(connection)


class MacConnection:
    """Answers as the kernel of macOS does: the 76 bytes of a struct xucred."""

    def __init__(self, version: int, user: int) -> None:
        groups = struct.pack("=16I", 20, 12, 61, *[0] * 13)
        self.xucred = struct.pack("=II", version, user) + struct.pack("=hxx", 3) + groups

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (0, 1, 76), "SOL_LOCAL, LOCAL_PEERCRED, a whole xucred"
        return self.xucred


@pytest.mark.parametrize(("version", "user", "same"), [(0, 501, True), (0, 502, False), (1, 501, False)])
def test_on_macos_the_user_is_read_from_an_xucred(
    version: int, user: int, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "getuid", lambda: 501)
    assert same_user(MacConnection(version, user)) is same  # type: ignore[arg-type]


def test_the_longest_path_is_the_systems_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a path below it may be too long by itself
    longest, longer = Path("y" * LONGEST_PATH), Path("y" * (LONGEST_PATH + 1))
    with listening(longest):
        assert longest.is_socket()
    refusal = pytest.raises(UserError, match=f"longer than the {LONGEST_PATH} letters")
    with refusal, listening(longer):
        pass
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one, pytest.raises(OSError, match="too long"):
        one.bind(str(longer))
