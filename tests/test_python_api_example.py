"""The worked example of the Python API runs as it stands."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "python_api.py"


@pytest.mark.slow
def test_the_example_runs_from_its_first_cell_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLE))
    shown = capsys.readouterr().out
    assert "a clinic: k = 1, " in shown and "round 2 None" in shown
    assert names["flame"].report.is_file() and (names["folder"] / "adapter_model.safetensors").is_file()
    for run in (names["flame"], names["median"]):
        losses = [scores[1]["loss"] for scores in run.scores.values()]
        assert len(losses) == 3 and losses[-1] < losses[0]
    assert {event["active_experts"] for event in names["median"].metrics if event["event"] == "client"} == {1}
