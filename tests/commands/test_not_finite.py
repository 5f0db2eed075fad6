"""A loss that is not finite is said: in the closing table, the report, the files, API and exit code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import arguments, events, invoke

import fedflame
from fedflame.training import evaluation
from fedflame.training.scores import Scores

TWO_ROUNDS = "server.num_server_rounds=2"


@pytest.fixture
def diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss at k = 4 is NaN after the first evaluation, and infinite in the category of the first row."""
    evaluate, taken = evaluation.evaluate, []

    def diverged(adapted: Any, held_out: Any, adapter: Any, k: int, *rest: Any, **more: Any) -> Any:
        scores: dict[str, Scores] = evaluate(adapted, held_out, adapter, k, *rest, **more)
        taken.append(k)
        if k == 4 and taken.count(4) > 1:
            first, *others = scores
            scores[first] = replace(scores[first], loss_sum=math.inf)
            scores |= {name: replace(scores[name], loss_sum=math.nan) for name in others}
        return scores

    monkeypatch.setattr("fedflame.server.rounds.evaluate", diverged)
    monkeypatch.setattr("fedflame.training.evaluation.evaluate", diverged)


def test_a_run_whose_last_rounds_diverged(diverge: None, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = invoke(*arguments(tiny_folder, run, TWO_ROUNDS))
    assert result.exit_code == 1
    assert result.stderr == (
        f"fedflame: {run}: the loss is not finite at k = 4 after round 2; take a smaller "
        "training.learning_rate, or go back with --resume-from\n"
    )
    closing = result.stdout[result.stdout.index("Global model: ") :].splitlines()
    row = next(line for line in closing if line.split()[:2] == ["4", "1"])
    assert row.split()[3:5] == ["not", "finite"], closing
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    at_4 = [event for event in events(run, "evaluation") if event["active_experts"] == 4]
    found = [event["loss"] for event in at_4 if event["category"] is None]
    assert math.isfinite(found[0]) and all(map(math.isnan, found[1:]))
    assert math.inf in [event["loss"] for event in at_4]
    scores = fedflame.Run(run).scores
    assert math.isnan(scores[2][4]["loss"] or 0) and math.isfinite(scores[2][1]["loss"] or math.nan)
    assert "not finite" in (run / "report.html").read_text()
    again = invoke("report", run)
    assert again.exit_code == 0


def test_an_evaluation_that_is_not_finite(diverge: None, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke(*arguments(tiny_folder, run, TWO_ROUNDS))
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


def test_a_run_that_recovered_is_finite(
    monkeypatch: pytest.MonkeyPatch, diverge: None, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert invoke(*arguments(tiny_folder, run, TWO_ROUNDS)).exit_code == 1
    monkeypatch.undo()
    settings = [part for part in arguments(tiny_folder, run, TWO_ROUNDS) if part != "--resume"]
    result = invoke(*settings, "--resume-from", "1")
    assert result.exit_code == 0, result.stderr
    assert "not finite" not in result.stdout
