"""Updates that wait on disk: they come back bit for bit, and a disk that cannot hold them is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.random_rounds import updates_of
from tests.same_bits import assert_same_adapter

from fedflame.errors import UserError
from fedflame.server.spool import Spool


def test_what_waits_comes_back_bit_for_bit_and_twice(tmp_path: Path) -> None:
    updates = updates_of(1, [3, 2])
    with Spool(tmp_path) as spool:
        for update in updates:
            assert not spool.put(update).delta.tensors()
        for _ in range(2):
            for got, wanted in zip(spool, updates, strict=True):
                assert_same_adapter(got.delta, wanted.delta)
                assert (got.client, got.tokens) == (wanted.client, wanted.tokens)


def test_a_folder_that_cannot_hold_updates_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot hold the updates of a round: No such file"):
        Spool(tmp_path / "none")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Spool(tmp_path) as spool, open("/dev/full", "wb") as full:
        monkeypatch.setattr(spool, "_file", full)
        with pytest.raises(UserError, match="cannot hold the updates of a round: No space left"):
            for update in updates_of(1, [3] * 60):
                spool.put(update)
            list(spool)
        monkeypatch.undo()


def test_a_disk_that_is_full_when_the_last_bytes_are_written_is_one_line_too(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        spool._file.close()
        spool._file = open("/dev/full", "wb", buffering=1 << 20)  # noqa: SIM115 (the spool closes it)
        spool.put(updates_of(1, [3])[0])
        with pytest.raises(UserError, match="cannot hold the updates of a round: No space left"):
            next(iter(spool))
