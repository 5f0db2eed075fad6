"""One process at a time: who comes second learns who holds the lock, and a dead process holds none."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from fedflame.errors import UserError
from fedflame.folder_lock import holder as named_holder
from fedflame.folder_lock import refuse_if_used, sole_user


def hold(lock: Path, told: Connection) -> None:
    with sole_user(lock, "taken"):
        told.send(os.getpid())
        told.recv()


def holder(lock: Path) -> tuple[int, Connection, multiprocessing.process.BaseProcess]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(lock, theirs))
    process.start()
    return ours.recv(), ours, process


def open_files() -> list[str]:
    gc.collect()  # the processes of other tests have files, too
    return os.listdir("/dev/fd")


def refusals(lock: Path) -> list[str]:
    found = []
    for attempt in (lambda: sole_user(lock, "taken").__enter__(), lambda: refuse_if_used(lock, "taken")):
        with pytest.raises(UserError) as refused:
            attempt()
        found.append(str(refused.value))
    return found


def test_the_second_learns_who_holds_it_and_changes_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    process, pipe, running = holder(lock)
    before = lock.read_bytes(), lock.stat().st_mtime_ns
    for line in refusals(lock):
        assert line.startswith(f"taken (process {process} on {socket.gethostname()} since 2")
        assert line.endswith(")") and "\n" not in line
    assert (lock.read_bytes(), lock.stat().st_mtime_ns) == before
    pipe.send(None)
    running.join(20)
    refuse_if_used(lock, "taken")
    with sole_user(lock, "taken"):
        assert f'"process": {os.getpid()}' in lock.read_text()


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    process, _, running = holder(lock)
    os.kill(process, signal.SIGKILL)
    running.join(20)
    assert lock.exists()
    refuse_if_used(lock, "taken")
    with sole_user(lock, "taken"):
        assert f'"process": {os.getpid()}' in lock.read_text()
    assert not lock.exists()


def test_whoever_looks_learns_who_holds_it_from_its_file_alone(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    assert named_holder(lock) == ""
    with sole_user(lock, ""):
        assert named_holder(lock).startswith(f"process {os.getpid()} on {socket.gethostname()} since 2")
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True)
    dead_process = ended.stdout.decode().strip()
    here, since = socket.gethostname(), '"since": "today"}'
    for dead in (dead_process, "0", "-1", "true", '"1"', str(2**40), str(2**62)):
        lock.write_text(f'{{"process": {dead}, "host": "{here}", {since}')
        assert named_holder(lock) == "", dead
    lock.write_text(f'{{"process": {dead_process}, "host": "elsewhere", {since}')
    assert named_holder(lock) == f"process {dead_process} on elsewhere since today"
    lock.write_text(f'{{"process": 1, "host": "{here}", {since}')  # of another user
    assert named_holder(lock) == f"process 1 on {here} since today"
    for damaged in ("", "[1]", '{"process": 7}'):
        lock.write_text(damaged)
        assert named_holder(lock) == ""


def test_at_the_end_the_lock_is_gone_and_its_folder_where_nothing_was_written(tmp_path: Path) -> None:
    with sole_user(tmp_path / "new" / ".lock", ""):
        pass
    assert not (tmp_path / "new").exists()
    with sole_user(tmp_path / "new" / ".lock", ""):
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]
    (tmp_path / "empty").mkdir()
    with sole_user(tmp_path / "empty" / ".lock", ""):
        pass
    assert (tmp_path / "empty").is_dir()


def test_a_lock_that_its_holder_removes_while_another_opens_it_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    lock, flock, swapped = tmp_path / ".lock", fcntl.flock, []

    def flock_late(file: int, how: int) -> None:
        if not swapped:  # the holder goes, and a third process makes a lock of its own
            swapped.append(lock.unlink())
            lock.touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with sole_user(lock, "taken"):
        monkeypatch.undo()
        assert f'"process": {os.getpid()}' in lock.read_text()
        with pytest.raises(UserError, match="taken"), sole_user(lock, "taken"):
            pass


def test_a_lock_that_its_holder_removes_while_another_opens_it_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    lock, flock, removed, before = tmp_path / ".lock", fcntl.flock, [], open_files()

    def flock_late(file: int, how: int) -> None:
        if not removed:
            removed.append(lock.unlink())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with sole_user(lock, "taken"):
        assert f'"process": {os.getpid()}' in lock.read_text()
    assert open_files() == before


def test_a_lock_that_cannot_be_written_is_one_line_and_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> dict[str, object]:
        raise OSError(28, "No space left on device")

    lock, before = tmp_path / ".lock", open_files()
    with monkeypatch.context() as patch, pytest.raises(UserError) as refused:
        patch.setattr("fedflame.folder_lock._this_process", full)
        sole_user(lock, "taken").__enter__()
    assert str(refused.value) == f"{lock}: cannot be locked: No space left on device"
    assert open_files() == before
    with sole_user(lock, "taken"):
        pass


def test_a_lock_that_says_nothing_still_holds(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with sole_user(lock, "taken"):
        for said in ("", "[", '{"process": 7}'):
            lock.write_text(said)
            assert refusals(lock) == ["taken (a process that has just begun)"] * 2


def test_where_no_lock_can_be_it_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / ".lock").mkdir()
    for lock in (tmp_path / "file" / ".lock", tmp_path / ".lock"):
        with pytest.raises(UserError, match=r"cannot be locked: (File exists|Is a directory)"):
            sole_user(lock, "").__enter__()
        refuse_if_used(lock, "")


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = open_files()
    with sole_user(tmp_path / ".lock", "taken"):
        refusals(tmp_path / ".lock")
    assert open_files() == before
