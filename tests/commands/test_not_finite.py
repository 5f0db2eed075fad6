"""A loss that is not finite is said: in the closing table, the report, the files, API and exit code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import arguments, events, invoke

from fedflame.run_files.checkpoints import kept_rounds
from fedflame.training import evaluation
from fedflame.training.scores import Scores

pytestmark = pytest.mark.slow

TWO_ROUNDS = "server.num_server_rounds=2"


@pytest.fixture
def diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss at k = 4 is NaN, and infinite in the category of the first row, after round 0."""
    evaluate, taken = evaluation.evaluate, []

    def diverged(adapted: Any, held_out: Any, adapter: Any, k: int, *rest: Any, **more: Any) -> Any:
        scores: dict[str, Scores] = evaluate(adapted, held_out, adapter, k, *rest, **more)
        taken.append(k)
        if k == 4 and taken.count(4) > 1:
            first, *others = scores
            scores[first] = replace(scores[first], loss_sum=math.inf)
            scores |= {name: replace(scores[name], loss_sum=math.nan) for name in others}
        return scores

    monkeypatch.setattr("fedflame.server.scoring.evaluate", diverged)
    monkeypatch.setattr("fedflame.training.evaluation.evaluate", diverged)


def test_a_run_that_diverges_ends_at_its_last_finite_round_and_says_so(
    monkeypatch: pytest.MonkeyPatch, diverge: None, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = invoke(*arguments(tiny_folder, run, TWO_ROUNDS))
    assert result.exit_code == 2
    assert result.stderr.startswith("fedflame: round 1: ") and result.stderr.count("\n") == 1, result.stderr
    assert "smaller training.learning_rate" in result.stderr
    assert "Global model: " not in result.stdout and kept_rounds(run) == [0]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert all(math.isfinite(event["loss"]) for event in events(run, "evaluation"))
    monkeypatch.undo()
    resumed = invoke(*arguments(tiny_folder, run, TWO_ROUNDS), "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "not finite" not in resumed.stdout


def test_an_evaluation_that_is_not_finite(
    tiny_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = tmp_path / "run"
    invoke(*arguments(tiny_folder, run, TWO_ROUNDS))
    request.getfixturevalue("diverge")
    assert invoke("evaluate", run, "--active-experts", "4,1").exit_code == 0
    result = invoke("evaluate", run, "--active-experts", "4,1")
    assert result.exit_code == 1
    assert result.stderr == f"fedflame: {run}: the loss is not finite at k = 4 after round 2\n"
    assert "not finite" in result.stdout
    result = invoke("evaluate", run, "--active-experts", "4", "--json")
    assert result.exit_code == 1
    shown = json.loads(result.stdout, parse_constant=pytest.fail)
    assert shown["4"]["all"]["loss"] is None and shown["not_finite"]["/4/all/loss"] == "NaN"
    of_a_base = invoke("evaluate", tiny_folder, "--set", "data.max_rows=48", "--active-experts", "4")
    assert of_a_base.stderr == f"fedflame: {tiny_folder}: the loss is not finite at k = 4\n"
