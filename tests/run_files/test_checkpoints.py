"""What a checkpoint says of itself is read from its first bytes, and refused in one line if it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refusal_of

from fedflame.errors import UserError
from fedflame.run_files.checkpoints import (
    FOLDER,
    FORMAT_VERSION,
    Kept,
    checkpoint_path,
    kept_rounds,
    last_kept,
    remove_later,
    write_sealed,
)
from fedflame.wire.frame import HEAD_BYTES, seal

SAYS = {"kind": "checkpoint", "round": 3, "metrics_bytes": 70}
TENSORS = {
    "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "y": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
}


def body_of(entries: Any, data: bytes = bytes(12)) -> bytes:
    """By the layout that safetensors documents."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def body_saying(says: Any, tensors: dict[str, Any] = TENSORS) -> bytes:
    return body_of({"__metadata__": {"fedflame": json.dumps(says)}, **tensors})


def put(run: Path, content: bytes) -> Path:
    path = checkpoint_path(run, 3)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(run: Path) -> str:
    said = refusal_of(last_kept, run)
    assert said.startswith(f"{checkpoint_path(run, 3)}: ")
    return said


def test_the_last_checkpoint_says_its_round_and_the_length_of_the_metrics(tmp_path: Path) -> None:
    assert last_kept(tmp_path) is None
    write_sealed(tmp_path, 2, body_saying(SAYS | {"round": 2, "metrics_bytes": 40}), most=2)
    write_sealed(tmp_path, 3, body_saying(SAYS), most=2)
    assert last_kept(tmp_path) == Kept(3, 70)


def test_a_checkpoint_of_no_tensors_ends_with_its_header(tmp_path: Path) -> None:
    put(tmp_path, seal(body_of({"__metadata__": {"fedflame": json.dumps(SAYS)}}, b""), FORMAT_VERSION))
    assert last_kept(tmp_path) == Kept(3, 70)


def test_a_checkpoint_of_any_other_length_is_refused(tmp_path: Path) -> None:
    whole = seal(body_saying(SAYS), FORMAT_VERSION)
    for length in range(len(whole)):
        put(tmp_path, whole[:length])
        begins = "it does not begin as a packed buffer does; " not in refusal(tmp_path)
        assert begins == (length >= HEAD_BYTES + 8)
    put(tmp_path, whole + b"\0")
    assert f"{len(whole) + 1:,} bytes, where it says that it has {len(whole):,}; " in refusal(tmp_path)


@pytest.mark.parametrize("size", [(64 << 20) + 1, 2**40, 2**63 - 1, 2**64 - 1])
def test_a_header_that_claims_to_be_huge_takes_no_memory(size: int, tmp_path: Path) -> None:
    put(tmp_path, seal(size.to_bytes(8, "little") + bytes(100), FORMAT_VERSION))
    assert "it does not begin as a packed buffer does; " in refusal(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "plan"},
        {"round": 2},
        {"round": "3"},
        {"metrics_bytes": None},
        {"metrics_bytes": "70"},
        {"metrics_bytes": 70.0},
        {"metrics_bytes": True},
        {"metrics_bytes": -1},
    ],
)
def test_the_header_of_another_checkpoint_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    put(tmp_path, seal(body_saying(SAYS | changed), FORMAT_VERSION))
    assert "it is not the checkpoint after round 3; " in refusal(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([1], id="no object"),
        pytest.param(b"[" * 100_000, id="nested too deep"),
        pytest.param(b"{", id="no JSON"),
        pytest.param({"x": {}}, id="a tensor without a place"),
        pytest.param({"x": 1}, id="a tensor that is a number"),
        pytest.param({"x": {"data_offsets": 1}}, id="a place that is a number"),
        pytest.param({"x": {"data_offsets": [0]}}, id="a place without an end"),
        pytest.param({"x": {"data_offsets": [0, None]}}, id="an end that is null"),
        pytest.param({"x": {"data_offsets": [0, "x"]}}, id="an end that is text"),
        pytest.param(b'{"x": {"data_offsets": [0, 1e999]}}', id="an end that is infinite"),
    ],
)
def test_places_that_are_none_are_refused(entries: Any, tmp_path: Path) -> None:
    put(tmp_path, seal(body_of(entries), FORMAT_VERSION))
    refusal(tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, [], {}, {"fedflame": None}, {"fedflame": "{"}, {"fedflame": "[1]"}]
)
def test_a_checkpoint_that_says_nothing_of_itself_is_refused(metadata: Any, tmp_path: Path) -> None:
    put(tmp_path, seal(body_of({"__metadata__": metadata, **TENSORS}), FORMAT_VERSION))
    refusal(tmp_path)


def test_a_best_round_that_is_among_the_last_is_read_from_there(tmp_path: Path) -> None:
    for kind in ("round", "best"):
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        (tmp_path / FOLDER / f"{kind}-3.sealed").write_bytes(kind.encode())
    assert checkpoint_path(tmp_path, 3).read_bytes() == b"round"
    checkpoint_path(tmp_path, 3).unlink()
    assert checkpoint_path(tmp_path, 3).read_bytes() == b"best"


def test_checkpoints_after_a_round_are_removed_and_no_others(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        write_sealed(tmp_path, number, b"body", most=9)
    remove_later(tmp_path, 2)
    assert kept_rounds(tmp_path) == [1, 2]


def test_a_checkpoint_that_cannot_be_removed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    write_sealed(tmp_path, 3, b"body", most=1)
    monkeypatch.setattr(Path, "unlink", forbidden)
    with pytest.raises(UserError) as refused:
        remove_later(tmp_path, 2)
    assert str(refused.value) == f"{checkpoint_path(tmp_path, 3)}: cannot be removed: Permission denied"


def test_a_checkpoint_that_somebody_removed_meanwhile_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(path: Path) -> None:
        unlink(path)
        unlink(path)

    unlink = Path.unlink
    for number in (1, 2, 3):
        write_sealed(tmp_path, number, b"body", most=9)
    monkeypatch.setattr(Path, "unlink", second)
    remove_later(tmp_path, 1)
    assert kept_rounds(tmp_path) == [1]


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    checkpoint_path(tmp_path, 3).mkdir(parents=True)
    assert "Is a directory" in refusal(tmp_path)
