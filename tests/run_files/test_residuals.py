"""The files of what clients owe: bit for bit, or refused in one line that says whose they are."""

from __future__ import annotations

from pathlib import Path

from tests.refusals import refusal_of

from fedflame.run_files.residuals import read_residual, residual_path, residual_rounds, write_residual
from fedflame.wire.frame import seal


def refusal(path: Path) -> str:
    line = refusal_of(read_residual, path)
    assert line.startswith(f"{path}: ") and line.endswith("; put back a copy of the file")
    return line.removeprefix(f"{path}: ").removesuffix("; put back a copy of the file")


def test_a_residual_comes_back_and_its_round_is_known(tmp_path: Path) -> None:
    for number in (10, 9):
        write_residual(residual_path(tmp_path, 7, number), b"body %d" % number)
    assert bytes(read_residual(residual_path(tmp_path, 7, 10))) == b"body 10"
    (tmp_path / "7" / "notes.sealed").touch()
    assert residual_rounds(tmp_path, 7) == [9, 10] and residual_rounds(tmp_path, 8) == []


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = residual_path(tmp_path, 7, 2)
    assert refusal(path) == "missing: what client 7 owes after round 2"
    path.mkdir(parents=True)
    assert refusal(path) == "cannot be read (Is a directory)"
    path.rmdir()
    path.write_bytes(b"mine")
    assert refusal(path) == "cannot be read (4 bytes that are no fedflame residual)"
    path.write_bytes(seal(b"body", 9))
    assert refusal(path) == "cannot be read (residual of version 9; this fedflame reads version 1)"
    write_residual(path, b"body")
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(path) == "cannot be read (its checksum is wrong: truncated or damaged on the way)"
