"""Trackers beside a run, the real packages where they are installed: each round is there once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import adapter_bytes, events, tiny_config
from tests.trackers.kept_curves import READERS, needs, tensorboard_curves

from fedflame.checked_json import read_checked, write_checked
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment
from fedflame.run_files.checkpoints import checkpoint_path
from fedflame.trackers import process
from fedflame.trackers.process import reporting
from fedflame.trackers.sinks import TensorBoard, TrackedRun

pytestmark = pytest.mark.slow

STEPS = 2
"""Of a round: round n is step 2 n."""


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time enough to import a tracker where all cores are at work."""
    monkeypatch.setattr(process, "END_SECONDS", 120.0)


def interrupted_in_round_2(config: Any) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "client" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(prepare(config), on_event=stop)


@pytest.mark.usefixtures("offline", "slow_machine")
@pytest.mark.parametrize("tracker", READERS)
def test_a_run_that_was_interrupted_and_resumed_is_one_run_with_each_round_once(
    tracker: str,
    tiny_folder: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
) -> None:
    needs(tracker)
    run = tmp_path / "run"
    config = tiny_config(tiny_folder, run, f"report_to={tracker}", "run_name=the-name")
    interrupted_in_round_2(config)
    again = tiny_config(tiny_folder, run, f"report_to={tracker}", "run_name=a-later-name")
    run_experiment(prepare(again, "resume"))
    curves = READERS[tracker](run)
    for k in (4, 2, 1):
        told = [
            (event["round"] * STEPS, pytest.approx(event["loss"], rel=1e-6))
            for event in events(run, "evaluation")
            if event["active_experts"] == k and event["category"] is None
        ]
        assert curves[f"eval/loss/k{k}"] == told and len(told) == 4
    assert [step for step, _ in curves["train/learning_rate"]] == [2, 4, 6]
    losses = [
        ((event["round"] - 1) * STEPS + at, pytest.approx(loss, rel=1e-6))
        for event in events(run, "client")
        if event["client"] == 0
        for at, loss in enumerate(event["step_losses"], 1)
    ]
    k = {event["active_experts"] for event in events(run, "client") if event["client"] == 0}
    of_client_0 = sorted(point for one in k for point in curves[f"train/step_loss/k{one}"])
    assert len(losses) == 6 and {step for step, _ in of_client_0} == {1, 2, 3, 4, 5, 6}
    assert all(any(point == wanted for point in of_client_0) for wanted in losses[:2])
    rates = [5e-3, 3.75e-3, 1.25e-3]  # the default of 5e-3, by a cosine: the shares 1, 3/4 and 1/4
    assert [value for _, value in curves["train/learning_rate"]] == pytest.approx(rates, rel=1e-6)
    assert all(len({number for number, _ in points}) == len(points) for points in curves.values())
    assert adapter_bytes(run) == adapter_bytes(undisturbed())


@pytest.mark.usefixtures("offline", "slow_machine")
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_that_is_named_later_gets_the_rounds_before_too_and_going_back_gives_no_round_twice(
    tracker: str, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    needs(tracker)
    run, lines = tmp_path / "run", list[str]()
    shutil.copytree(undisturbed(), run)
    for _ in range(2):
        with reporting([tracker], run, "the-name", lines.append):  # type: ignore[list-item]
            pass
    checkpoint_path(run, 3).rename(run / "aside")  # as after --resume-from 2
    with reporting([tracker], run, "the-name", lines.append):  # type: ignore[list-item]
        (run / "aside").rename(checkpoint_path(run, 3))
    curves = READERS[tracker](run)
    assert [step // STEPS for step, _ in curves["eval/loss/k2"]] == [0, 1, 2, 3]
    assert lines == []


@pytest.mark.usefixtures("offline", "slow_machine")
@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_round_that_was_sent_but_not_noted_before_a_kill_is_there_once(
    tracker: str, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    needs(tracker)
    run, lines = tmp_path / "run", list[str]()
    shutil.copytree(undisturbed(), run)
    state = run / "trackers" / f"{tracker}.json"
    for _ in range(2):
        with reporting([tracker], run, "the-name", lines.append):  # type: ignore[list-item]
            pass
        write_checked(state, read_checked(state, "") | {"round": 1})
    curves = READERS[tracker](run)
    assert [step // STEPS for step, _ in curves["eval/loss/k2"]] == [0, 1, 2, 3]
    assert lines == []


def test_a_run_that_is_resumed_within_a_second_by_a_process_of_any_number_is_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads files in the order of their names, and names have the second and the process."""
    needs("tensorboard")
    for first_round, number in ((1, 9_999), (2, 10_000)):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        sink = TensorBoard(TrackedRun(tmp_path, "the-name", {}, "", first_round, STEPS))
        sink.log({first_round * STEPS: {"loss": float(first_round)}})
        sink.close(finished=True)
    assert tensorboard_curves(tmp_path) == {"loss": [(2, 1.0), (4, 2.0)]}
