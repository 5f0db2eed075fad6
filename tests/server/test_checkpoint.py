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
from torch import Tensor

from fedflame.errors import UserError
from fedflame.messages import NOTHING, Adapter
from fedflame.server.checkpoint import (
    FILE_NAME,
    FORMAT_VERSION,
    Checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from fedflame.strategies.base import Past, ServerState

PAST = Past(0.1, (1 / 3, 5e-324), (0.7,))


def a_checkpoint(round_number: int = 3) -> Checkpoint:
    """Values of any bit pattern, NaN payloads and denormals among them."""
    generator = torch.Generator().manual_seed(round_number)

    def values(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)

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
    pairs = [(got.state.rescalers[k], value) for k, value in wanted.state.rescalers.items()]
    assert list(got.state.tier_adapters) == list(wanted.state.tier_adapters)
    adapters = [(got.state.adapter_at(k), its) for k, its in wanted.state.tier_adapters.items()]
    adapters += [(got.state.adapter, wanted.state.adapter), (got.state.merged, wanted.state.merged)]
    for mine, its in adapters:
        assert mine.tensors().keys() == its.tensors().keys()
        pairs += [(mine.tensors()[name], value) for name, value in its.tensors().items()]
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


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


def test_the_next_checkpoint_replaces_the_one_before_and_leaves_one_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint(3))
    write_checkpoint(tmp_path, a_checkpoint(4))
    assert_same(read_checkpoint(tmp_path), a_checkpoint(4))
    assert files(tmp_path) == [FILE_NAME]


def refusal(run: Path) -> str:
    with pytest.raises(UserError) as error:
        read_checkpoint(run)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{run / FILE_NAME}: ")
    return message.removeprefix(f"{run / FILE_NAME}: ")


def test_without_a_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    wanted = "No such file or directory; the run has no checkpoint to go on from"
    assert refusal(tmp_path) == wanted


def test_a_folder_in_the_checkpoints_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir(parents=True)
    assert refusal(tmp_path) == "Is a directory; the run has no checkpoint to go on from"


def test_a_truncated_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, a_checkpoint())
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 17), *range(12), len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert refusal(tmp_path).startswith("truncated or no fedflame checkpoint (")
        assert path.read_bytes() == whole[:length]


def with_header(**header: Any) -> bytes:
    tensors = {"experts.0.A1": torch.ones(2), "rescalers.8": torch.ones(2)}
    return save(tensors, metadata={"fedflame": json.dumps(header)})


HEADER: dict[str, Any] = {
    "version": FORMAT_VERSION, "round": 1, "metrics_bytes": 0, "trainable": "both", "ranks": {},
    "tier_adapters": [], "past": asdict(PAST),
}  # fmt: skip
FOREIGN = {
    "text": b"# notes\nnot a checkpoint\n" * 10,
    "zeros": bytes(5000),
    "another tool's safetensors": save({"weight": torch.ones(3)}),
    "another tool's metadata": save({"weight": torch.ones(3)}, metadata={"format": "pt"}),
    "header no JSON": save({"x": torch.ones(3)}, metadata={"fedflame": "{"}),
    "header no object": save({"x": torch.ones(3)}, metadata={"fedflame": "[1]"}),
    "header nested too deep": save({"x": torch.ones(3)}, metadata={"fedflame": "[" * 100_000}),
    "an update": with_header(kind="update", version=FORMAT_VERSION, round=2, client=1),
    "no round": with_header(version=FORMAT_VERSION, metrics_bytes=0),
    "round no number": with_header(version=FORMAT_VERSION, metrics_bytes=0, round="x"),
    "round infinite": with_header(version=FORMAT_VERSION, metrics_bytes=0, round=float("inf")),
    "a tier that is no number": save(
        {"rescalers.x": torch.ones(2)},
        metadata={"fedflame": json.dumps(HEADER)},
    ),
    "no half": with_header(version=FORMAT_VERSION, round=1, metrics_bytes=0),
    "tier adapters no list": with_header(**HEADER | {"tier_adapters": 4}),
    "ranks no object": with_header(**HEADER | {"ranks": [1]}),
    "paces no list": with_header(**HEADER | {"past": {"reach": 0.0, "paces": 1, "rescaler_paces": []}}),
    "past no object": with_header(**HEADER | {"past": 4}),
    "another half": with_header(**HEADER | {"trainable": "C"}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / FILE_NAME
    path.parent.mkdir()
    path.write_bytes(FOREIGN[kind])
    assert refusal(tmp_path).startswith("truncated or no fedflame checkpoint (")
    assert path.read_bytes() == FOREIGN[kind]


def test_another_version_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.parent.mkdir()
    path.write_bytes(with_header(version=1, round=1, metrics_bytes=0))
    assert refusal(tmp_path) == "checkpoint version 1; this fedflame reads version 3"


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
    assert message.startswith(f"{tmp_path / FILE_NAME}: cannot write ")
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


def test_killed_before_the_rename_the_checkpoint_before_is_read_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    write_checkpoint(tmp_path, a_checkpoint(3))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", kill)
        write_checkpoint(tmp_path, a_checkpoint(4))
    assert_same(read_checkpoint(tmp_path), a_checkpoint(3))
    write_checkpoint(tmp_path, a_checkpoint(5))
    assert_same(read_checkpoint(tmp_path), a_checkpoint(5))
    assert files(tmp_path) == [FILE_NAME]
