"""The lines of metrics.jsonl: whatever happens to one of them is noticed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refusal_of

from fedflame.errors import UserError
from fedflame.run_files import ADVICE
from fedflame.run_files.lines import START, Place, last_checksum, line_of, read_lines, read_on

RECORDS: list[dict[str, Any]] = [
    {"event": "evaluation", "round": 0, "loss": 4.75, "category": 'a "b", "checksum": "0123456789abcdef"}'},
    {"event": "evaluation", "round": 0, "loss": math.nan, "category": None},
    {"event": "client", "round": 1, "counts": [[1, 2], [3, 4]], "rescaler": [1.0, -math.inf]},
    {"event": "round", "round": 1, "clients": 3},
]


def lines() -> list[bytes]:
    found, before = [], ""
    for record in RECORDS:
        line, before = line_of(record, before)
        found.append(line)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines()))
    return tmp_path / "metrics.jsonl"


def read(path: Path, kept: int = 0, most: int | None = None) -> str:
    return repr(list(read_lines(path, kept, most)))


def refusal(path: Path, kept: int = 0) -> str:
    line = refusal_of(read, path, kept)
    assert line.startswith(f"{path}") and line.endswith(f"; {ADVICE}")
    return line.removeprefix(f"{path}").removesuffix(f"; {ADVICE}")


def test_records_come_back_and_every_line_is_json_for_every_reader(path: Path) -> None:
    assert read(path) == repr(RECORDS)
    for line in path.read_bytes().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_as_far_as_a_checkpoint_knows_it_is_read_alone(path: Path) -> None:
    size = len(b"".join(lines()[:2]))
    path.write_bytes(path.read_bytes()[: size + 5] + b"damage\n")
    assert read(path, size, size) == repr(RECORDS[:2])
    assert last_checksum(path, size).encode() in lines()[1]
    assert last_checksum(path, 0) == ""
    with pytest.raises(UserError, match=r"line 3: damaged"):
        read(path, size)
    for wrong in (size - 1, size + 1):
        with pytest.raises(UserError, match=r"damaged|bytes of lines"):
            read(path, wrong, wrong)


def test_a_line_that_is_lost_moved_or_put_in_is_noticed(path: Path) -> None:
    first, second, third, fourth = lines()
    for number, damaged in (
        (1, [second, third, fourth]),
        (2, [first, third, second, fourth]),
        (2, [first, first, second]),
        (3, [first, second, fourth]),
        (2, [first, b"{}\n", second]),
        (2, [first, b"\n", second]),
        (1, [json.dumps(RECORDS[0]).encode() + b"\n"]),
        (2, [first, second[:-1] + b" \n", third]),
        (2, [first, second[:-1] + b"}\n", third]),
    ):
        path.write_bytes(b"".join(damaged))
        assert refusal(path) == f", line {number}: damaged or edited"


def test_a_line_whose_checksum_is_right_must_still_be_an_object(path: Path) -> None:
    body = b'{"a": 1, "not_finite": {"/b": "NaN"}}'
    from fedflame.checked_json import checksum

    path.write_bytes(body[:-1] + f', "checksum": "{checksum(body)}"}}\n'.encode())
    assert refusal(path) == ", line 1: damaged or edited"


def test_what_was_still_being_written_is_left_out(path: Path) -> None:
    whole = path.read_bytes()
    last = len(lines()[-1])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        assert read(path) == repr(RECORDS[:-1])
        needed = f": {len(whole) - last:,} bytes of lines; its checkpoint needs {len(whole):,}"
        assert refusal(path, len(whole)) == needed


def test_a_missing_file_is_named(path: Path) -> None:
    path.unlink()
    assert refusal(path) == ": No such file or directory"
    path.mkdir()
    assert refusal(path) == ": Is a directory"


@pytest.mark.slow
def test_every_flipped_bit_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(flipped))
        assert "damaged or edited" in refusal(path, len(whole))
        refusal(path)


def test_reading_on_gives_each_record_once_and_knows_what_stood_before(path: Path) -> None:
    sizes = [len(b"".join(lines()[:count])) for count in range(len(RECORDS) + 1)]
    for first in range(len(sizes)):
        for second in range(first, len(sizes)):
            found, place = read_on(path, START, sizes[first])
            more, after = read_on(path, place, sizes[second])
            assert repr(found + more) == repr(RECORDS[:second])
            assert (place.size, place.lines, after.lines) == (sizes[first], first, second)
    path.write_bytes(b"".join([lines()[0], lines()[2]]))
    _, place = read_on(path, START, sizes[1])
    with pytest.raises(UserError, match="line 2: damaged or edited"):
        read_on(path, place, path.stat().st_size)
    path.write_bytes(b"".join(lines()[:2]))
    with pytest.raises(UserError, match="its checkpoint needs"):
        read_on(path, Place(sizes[1], 1, place.checksum), sizes[4])
