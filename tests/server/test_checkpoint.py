"""The checkpoint: bit for bit, refused when damaged, and whole whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.message_samples import random_bits
from tests.refusals import refusal_of
from tests.same_bits import assert_same_adapter, assert_same_bits
from torch import Tensor

from fedflame.errors import UserError
from fedflame.messages import NOTHING, Adapter
from fedflame.run_files import ADVICE
from fedflame.run_files.checkpoints import FORMAT_VERSION, kept_rounds
from fedflame.server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fedflame.strategies.base import Past, ServerState
from fedflame.wire.frame import seal

PAST = Past(0.1, (1 / 3, 5e-324), (0.7,))
FILE_NAME = "checkpoint/round-3.sealed"


def a_checkpoint(round_number: int = 3) -> Checkpoint:
    """Values of any bit pattern, NaN payloads and denormals among them."""
    generator = torch.Generator().manual_seed(round_number)

    def values(*shape: int) -> Tensor:
        return random_bits(generator, *shape)

    adapter = Adapter({"0.A1": values(5, 6, 7), "1.B2": values(5, 7, 3)}, {"layers.0.q_proj.A": values(3, 6)})
    merged = Adapter({"0.A1": values(5, 4, 7)}, {"layers.0.q_proj.A": values(2, 6)})
    tiers = {k: Adapter({"0.A1": values(5, 6, 7)}, {"layers.0.q_proj.A": values(3, 6)}) for k in (12, 1)}
    state = ServerState(adapter, {12: values(2), 1: values(2)}, merged, "A", {11: 3, 2: 1}, tiers, PAST)
    return Checkpoint(round_number, 2**40 + 1, state)


def assert_same(got: Checkpoint, wanted: Checkpoint) -> None:
    assert (got.round, got.metrics_bytes) == (wanted.round, wanted.metrics_bytes)
    assert (got.state.trainable, got.state.ranks) == (wanted.state.trainable, wanted.state.ranks)
    assert got.state.past == wanted.state.past
    assert got.state.rescalers.keys() == wanted.state.rescalers.keys()
    for k, value in wanted.state.rescalers.items():
        assert_same_bits(got.state.rescalers[k], value, k)
    assert list(got.state.tier_adapters) == list(wanted.state.tier_adapters)
    for k, adapter in wanted.state.tier_adapters.items():
        assert_same_adapter(got.state.adapter_at(k), adapter)
    assert_same_adapter(got.state.adapter, wanted.state.adapter)
    assert_same_adapter(got.state.merged, wanted.state.merged)


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint())
    assert_same(read_checkpoint(tmp_path), a_checkpoint())


def test_a_checkpoint_without_merged_factors_comes_back_without(tmp_path: Path) -> None:
    whole = a_checkpoint()
    wanted = replace(whole, state=replace(whole.state, merged=NOTHING))
    write_checkpoint(tmp_path, wanted)
    assert_same(read_checkpoint(tmp_path), wanted)


def test_a_state_that_was_read_can_be_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint())
    before = (tmp_path / FILE_NAME).read_bytes()
    write_checkpoint(tmp_path, read_checkpoint(tmp_path))
    assert (tmp_path / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize(("limit", "kept"), [(1, [6]), (2, [5, 6]), (3, [4, 5, 6]), (9, [3, 4, 5, 6])])
def test_the_last_checkpoints_stay(tmp_path: Path, limit: int, kept: list[int]) -> None:
    for number in (3, 4, 5, 6):
        write_checkpoint(tmp_path, a_checkpoint(number), limit)
    assert files(tmp_path) == [f"checkpoint/round-{number}.sealed" for number in kept]
    assert_same(read_checkpoint(tmp_path), a_checkpoint(6))
    for number in kept:
        assert_same(read_checkpoint(tmp_path, number), a_checkpoint(number))


def test_the_last_round_is_the_largest_number(tmp_path: Path) -> None:
    for number in (9, 10):
        write_checkpoint(tmp_path, a_checkpoint(number), 2)
    assert read_checkpoint(tmp_path).round == 10


def test_a_round_that_is_not_kept_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for number in (3, 4):
        write_checkpoint(tmp_path, a_checkpoint(number), 2)
    with pytest.raises(UserError) as refused:
        read_checkpoint(tmp_path, 2)
    assert str(refused.value) == (
        f"{tmp_path}: no checkpoint after round 2 is kept; there are those after 3, 4"
    )


def refusal(run: Path) -> str:
    message = refusal_of(read_checkpoint, run)
    assert message.startswith(f"{run / FILE_NAME}: ") and message.endswith(f"; {ADVICE}")
    return message.removeprefix(f"{run / FILE_NAME}: ").removesuffix(f"; {ADVICE}")


def put(run: Path, content: bytes) -> None:
    (run / FILE_NAME).parent.mkdir(exist_ok=True)
    (run / FILE_NAME).write_bytes(content)


def test_without_a_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_checkpoint(tmp_path)
    wanted = "the run has no checkpoint; put back a copy of it, or start anew"
    assert str(refused.value) == f"{tmp_path / 'checkpoint'}: {wanted}"


def test_a_folder_in_the_checkpoints_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir(parents=True)
    assert refusal(tmp_path) == "Is a directory"


def test_a_damaged_checkpoint_names_the_rounds_that_are_left(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_checkpoint(tmp_path, a_checkpoint(number), 3)
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"put back a copy of the file, or --resume-from 1 or 2$"):
        read_checkpoint(tmp_path)
    assert_same(read_checkpoint(tmp_path, 2), a_checkpoint(2))


def test_a_truncated_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint())
    whole = (tmp_path / FILE_NAME).read_bytes()
    for length in {*range(0, len(whole), 17), *range(60), len(whole) - 1}:
        put(tmp_path, whole[:length])
        got = refusal(tmp_path)
        assert got == (
            f"{length} bytes that are no fedflame checkpoint"
            if length < 48
            else "its checksum is wrong: truncated or damaged on the way"
        )
        assert (tmp_path / FILE_NAME).read_bytes() == whole[:length]


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint())
    whole = (tmp_path / FILE_NAME).read_bytes()
    for place in [*range(60 * 8), *range(60 * 8, len(whole) * 8, 97)]:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        put(tmp_path, bytes(flipped))
        refusal(tmp_path)


HEADER: dict[str, Any] = {
    "kind": "checkpoint", "round": 3, "metrics_bytes": 0, "trainable": "both", "ranks": {},
    "tier_adapters": [], "past": asdict(PAST),
}  # fmt: skip


def with_header(**changed: Any) -> bytes:
    tensors = {"experts.0.A1": torch.ones(2), "rescalers.8": torch.ones(2)}
    header = {key: value for key, value in (HEADER | changed).items() if value is not None}
    return save(tensors, metadata={"fedflame": json.dumps(header)})


def with_metadata(text: str) -> bytes:
    return save({"x": torch.ones(3)}, metadata={"fedflame": text})


def test_what_the_foreign_files_are_made_from_is_a_checkpoint(tmp_path: Path) -> None:
    put(tmp_path, seal(with_header(), FORMAT_VERSION))
    assert read_checkpoint(tmp_path).round == 3


SEALED = {
    "nothing": b"",
    "a header that is longer than the file": (2**40).to_bytes(8, "little") + b"{}",
    "another tool's safetensors": save({"weight": torch.ones(3)}),
    "another tool's metadata": save({"weight": torch.ones(3)}, metadata={"format": "pt"}),
    "header no JSON": with_metadata("{"),
    "header no object": with_metadata("[1]"),
    "header nested too deep": with_metadata("[" * 100_000),
    "an update": with_header(kind="update"),
    "another round": with_header(round=2),
    "no round": with_header(round=None),
    "round no number": with_header(round="x"),
    "round infinite": with_header(round=float("inf")),
    "no length of the metrics": with_header(metrics_bytes=None),
    "a negative length of the metrics": with_header(metrics_bytes=-1),
    "a length of the metrics in text": with_header(metrics_bytes="7"),
    "no half": with_header(trainable=None),
    "another half": with_header(trainable="C"),
    "a half that is a list": with_header(trainable=["A"]),
    "tier adapters no list": with_header(tier_adapters=4),
    "ranks no object": with_header(ranks=[1]),
    "a rank that is infinite": with_header(ranks={"1": float("inf")}),
    "a tier that is no number": save(
        {"rescalers.x": torch.ones(2)}, metadata={"fedflame": json.dumps(HEADER)}
    ),
    "paces no list": with_header(past={"reach": 0.0, "paces": 1, "rescaler_paces": []}),
    "past no object": with_header(past=4),
}


@pytest.mark.parametrize("kind", SEALED)
def test_a_sealed_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    put(tmp_path, seal(SEALED[kind], FORMAT_VERSION))
    refusal(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == seal(SEALED[kind], FORMAT_VERSION)


@pytest.mark.parametrize("content", [b"# notes\nnot a checkpoint\n" * 10, bytes(5000), with_header()])
def test_an_unsealed_file_is_refused(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, content)
    assert refusal(tmp_path) == f"{len(content)} bytes that are no fedflame checkpoint"


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    put(tmp_path, seal(with_header(), 2))
    assert refusal(tmp_path) == "checkpoint of version 2; this fedflame reads version 3"


def test_files_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint(3))
    for name in ("round-x.sealed", "round-04.sealed", "round-5.sealed.copy", "round-.sealed", "state.sealed"):
        (tmp_path / "checkpoint" / name).write_text("mine")
    assert kept_rounds(tmp_path) == [3]
    assert read_checkpoint(tmp_path).round == 3


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("owner, call", [(os, "fsync"), (Path, "replace"), (Path, "open")])
def test_on_a_full_disk_the_checkpoint_before_stays_readable_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, call: str
) -> None:
    write_checkpoint(tmp_path, a_checkpoint(3))
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(owner, call, no_space)
        write_checkpoint(tmp_path, a_checkpoint(4))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'checkpoint/round-4.sealed'}: cannot write ")
    assert message.endswith(" bytes: No space left on device")
    assert files(tmp_path) == [FILE_NAME]
    assert_same(read_checkpoint(tmp_path), a_checkpoint(3))


def test_on_a_full_disk_the_first_checkpoint_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        write_checkpoint(tmp_path, a_checkpoint())
    assert files(tmp_path) == []


class Killed(BaseException):
    pass


def kill(*_: object, **__: object) -> None:
    raise Killed


def test_killed_before_the_rename_the_checkpoint_before_is_read_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, a_checkpoint(3))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", kill)
        write_checkpoint(tmp_path, a_checkpoint(4))
    assert_same(read_checkpoint(tmp_path), a_checkpoint(3))
    write_checkpoint(tmp_path, a_checkpoint(5))
    assert_same(read_checkpoint(tmp_path), a_checkpoint(5))
    assert files(tmp_path) == ["checkpoint/round-5.sealed"], "what the killed process left is gone"


def test_killed_before_the_old_one_is_removed_both_are_there_and_the_next_removes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, a_checkpoint(3))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", kill)
        write_checkpoint(tmp_path, a_checkpoint(4))
    assert kept_rounds(tmp_path) == [3, 4]
    assert_same(read_checkpoint(tmp_path), a_checkpoint(4))
    write_checkpoint(tmp_path, a_checkpoint(5))
    assert kept_rounds(tmp_path) == [5]
