"""Unix sockets: the file, the length of its path, and who is at the other end."""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from pathlib import Path

import pytest

from fedflame.errors import UserError
from fedflame.trainer.unix_socket import LONGEST_PATH, listening, same_user


def the_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_folder_and_socket_are_the_owners_alone_and_later_files_are_as_before(tmp_path: Path) -> None:
    before, path = the_umask(), tmp_path / "folder" / "socket"
    with listening(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert the_umask() == before
    assert not path.exists()


def test_what_an_earlier_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(path))
    assert path.exists()
    with listening(path) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        accepted, _ = listener.accept()
        with accepted:
            assert same_user(accepted)


@pytest.mark.parametrize("kind", ["file", "link", "folder", "pipe"])
def test_what_is_no_socket_stays(kind: str, tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.jsonl", tmp_path / "mine.jsonl"
    rows.write_text("years of work")
    {
        "file": lambda: path.write_text("years of work"),
        "link": lambda: path.symlink_to(rows),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    before = path.lstat()
    with pytest.raises(UserError, match=r"is no socket and stays; trainer\.socket needs a free path"):
        listening(path).__enter__()
    assert path.lstat() == before and rows.read_text() == "years of work"


def test_what_was_put_in_the_sockets_place_stays_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening(path):
        path.unlink()
        path.write_text("years of work")
    assert path.read_text() == "years of work"


def test_where_nothing_can_be_put_the_reason_is_one_line_and_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    files, before = os.listdir("/dev/fd"), the_umask()
    for path, reason in (
        (tmp_path / "folder", "what is there is no socket and stays"),
        (tmp_path / "file" / "socket", "File exists|Not a directory"),
        (tmp_path / ("x" * 108), "longer than the 107 letters"),
        (Path("/proc/self/socket"), "No such file or directory|Operation not permitted|Permission denied"),
    ):
        with pytest.raises(UserError, match=rf"^socket {path}: ({reason})"), listening(path):
            pass
    assert os.listdir("/dev/fd") == files and the_umask() == before


def test_a_path_of_just_as_many_letters_as_the_system_allows_is_taken(tmp_path: Path) -> None:
    path = tmp_path / ("x" * (106 - len(str(tmp_path))))
    assert len(str(path)) == 107
    with listening(path):
        assert path.is_socket()


def test_a_socket_that_somebody_removed_meanwhile_costs_nothing(tmp_path: Path) -> None:
    with listening(tmp_path / "socket"):
        (tmp_path / "socket").unlink()


def test_an_error_of_the_body_passes_and_the_socket_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), listening(tmp_path / "socket"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


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
