"""The socket file: whose it is, what it replaces and what it leaves."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from fedflame.errors import UserError
from fedflame.trainer.unix_socket import listening, same_user


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


def test_where_nothing_can_be_put_the_reason_is_one_line_and_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    files, before = os.listdir("/dev/fd"), the_umask()
    for path, reason in (
        (tmp_path / "folder", "Is a directory"),
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
