"""metrics.jsonl: what a disk cannot take is one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedflame.errors import UserError
from fedflame.run_files.lines import read_lines
from fedflame.server.metrics import MetricsFile


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[MetricsFile]:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    yield file
    file.close()


def test_what_is_cut_off_is_gone_and_the_lines_go_on_from_there(metrics: MetricsFile, tmp_path: Path) -> None:
    metrics.log("round", round=1)
    size = metrics.sync()
    metrics.log("round", round=2)
    metrics.cut(size)
    metrics.log("round", round=3)
    records = list(read_lines(tmp_path / "metrics.jsonl", metrics.size))
    assert records == [{"event": "round", "round": 1}, {"event": "round", "round": 3}]
    metrics.cut(0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"" and metrics.size == 0


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        MetricsFile(tmp_path)
    assert str(refused.value) == f"{tmp_path}: cannot open: Is a directory"


def test_a_disk_that_takes_no_more_is_one_line(
    metrics: MetricsFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal() -> str:
        return str(refused.value).removeprefix(f"{tmp_path / 'metrics.jsonl'}: cannot write: ")

    with open("/dev/full", "wb", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(metrics, "_file", full)
        with pytest.raises(UserError) as refused:
            metrics.log("round", round=1)
        assert refusal() == "No space left on device"
        for attempt in (metrics.sync, lambda: metrics.cut(0)):  # neither can be done with a device
            with pytest.raises(UserError) as refused:
                attempt()
            assert refusal() == "Invalid argument"
