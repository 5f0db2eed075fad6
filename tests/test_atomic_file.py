"""A file is the old or the new one whole, whatever fails on the way."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedflame.atomic_file import write_atomically, write_missing
from fedflame.errors import UserError

resource = pytest.importorskip("resource", reason="limits of the system, POSIX only")


def test_the_content_is_written_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, b"\0\r\n\xff")
    assert path.read_bytes() == b"\0\r\n\xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_a_longer_file_is_replaced_by_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"x" * 1000)
    write_atomically(path, b"")
    assert path.read_bytes() == b""


def test_a_partial_file_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"left behind, and longer than the new content")
    write_atomically(tmp_path / "file", b"new")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"new"}


def test_content_is_on_disk_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append("fsync folder" if stat.S_ISDIR(status.st_mode) else f"fsync {status.st_size} bytes")
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"rename {self.name} to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_atomically(tmp_path / "file", b"12345")
    assert events == ["fsync 5 bytes", "rename file.partial to file", "fsync folder"]


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    write_missing({tmp_path / "there": "yours", tmp_path / "folder" / "new": "yours"})
    assert (tmp_path / "there").read_text() == "mine"
    assert (tmp_path / "folder" / "new").read_text() == "yours"


def test_no_file_stays_open_whatever_the_disk_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/dev/fd")
    write_atomically(tmp_path / "file", b"content")
    monkeypatch.setattr(os, "fsync", fails_for_folders)
    with pytest.raises(UserError):
        write_atomically(tmp_path / "file", b"content")
    assert os.listdir("/dev/fd") == before


def fails_for_folders(descriptor: int) -> None:
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def failing(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("owner, call", [(os, "fsync"), (Path, "open"), (Path, "replace"), (Path, "mkdir")])
def test_an_error_of_the_system_is_one_line_and_the_old_content_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str, number: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(owner, call, failing(number))
        write_atomically(path, b"new content")
    assert str(error.value) == f"{path}: cannot write 11 bytes: {os.strerror(number)}"
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"old"}


def test_a_write_that_the_system_cuts_short_leaves_the_old_content(tmp_path: Path) -> None:
    """A true short write: the process may make no file larger than 1000 bytes."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError) as error:
            write_atomically(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{path}: cannot write 5000 bytes: File too large"
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"file": b"old"}


def test_a_file_in_the_folders_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for path, reason in (("file/x", "File exists"), ("file/y/x", "Not a directory")):
        with pytest.raises(UserError) as error:
            write_atomically(tmp_path / path, b"new")
        assert str(error.value) == f"{tmp_path / path}: cannot write 3 bytes: {reason}"
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_in_the_files_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot write 3 bytes: Is a directory"):
        write_atomically(tmp_path / "folder", b"new")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder", "folder/inside"]


def test_a_folder_in_the_partial_files_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file.partial").mkdir()
    with pytest.raises(UserError, match="cannot write 3 bytes: Is a directory"):
        write_atomically(tmp_path / "file", b"new")


def test_a_name_that_is_too_long_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write 3 bytes: File name too long"):
        write_atomically(tmp_path / ("n" * 255), b"new")
    assert list(tmp_path.iterdir()) == []
