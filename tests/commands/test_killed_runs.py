"""The same bytes in the end: of a run that is done again, killed, told to end, or shared by workers."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli_process import CliProcess, wait_until_gone
from tests.tiny_runs import (
    ANSWERS,
    adapter_bytes,
    arguments,
    set_options,
    start_cli,
    state_bytes,
    timeless,
    tiny_config,
    tiny_run,
    wait_for_lines,
)

from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment
from fedflame.server.checkpoint import read_checkpoint
from loopback import descendants

TWO_ROWS = "training.per_device_train_batch_size=2"


def test_the_same_run_twice_gives_the_same_bytes(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tiny_run(tiny_folder, tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(finished)
    assert state_bytes(tmp_path / "again") == state_bytes(finished)


@pytest.mark.slow
def test_another_seed_gives_other_bytes(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tiny_run(tiny_folder, tmp_path / "other", "seed=1")
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(finished)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_at_three_instants_and_resumed_it_ends_in_the_same_bytes(
    undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    finished = undisturbed(ANSWERS)  # to generate the last of them takes longer than the kill
    run, rng = tmp_path / "killed", random.Random(time.time_ns())
    lines = len((finished / "metrics.jsonl").read_text().splitlines())
    goals = sorted(rng.sample(range(1, lines - 1), 3))
    for number, goal in enumerate(goals):
        process = start(tiny_folder, run, "--set", ANSWERS, *(["--resume"] if number else []))
        wait_for_lines(process, run, goal)
        time.sleep(rng.random() * 0.05)
        process.kill()
        assert process.wait(20) == -signal.SIGKILL, f"goals {goals}"
    begun = (run / "config.json").exists()
    process = start(tiny_folder, run, "--set", ANSWERS, "--resume" if begun else "--overwrite")
    assert process.wait(60) == 0, f"goals {goals}"
    assert adapter_bytes(run) == adapter_bytes(finished), f"goals {goals}"
    assert state_bytes(run) == state_bytes(finished)
    assert timeless(run) == timeless(finished)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_rounded_and_packed_what_clients_owe_survives_a_kill_with_workers_of_which_none_is_left(
    finished: Path, undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    packing, rounding = ("training.packing=true", TWO_ROWS), "communication.update_dtype=int8"
    alone, killed = undisturbed(*packing, rounding), tmp_path / "killed"
    goal = random.Random(time.time_ns()).randrange(
        10, len((alone / "metrics.jsonl").read_text().splitlines())
    )
    setting = set_options(*packing, rounding)
    process = start(tiny_folder, killed, *setting, "--workers", "3")
    wait_for_lines(process, killed, 1)
    children = descendants(process.pid)
    assert len(children) >= 3, "the fork server and two other workers, which are there before the first round"
    wait_for_lines(process, killed, goal)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL, f"goal {goal}"
    wait_until_gone(children)
    tiny_run(tiny_folder, killed, *packing, rounding, existing="resume")
    assert adapter_bytes(killed) == adapter_bytes(alone), f"goal {goal}"
    assert state_bytes(killed) == state_bytes(alone)
    assert len({adapter_bytes(run) for run in (finished, undisturbed(*packing), alone)}) == 3


ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_is_told_to_end_says_how_to_go_on_and_goes_on_to_the_same_bytes(
    end: signal.Signals, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(tiny_folder, run)
    wait_for_lines(process, run, 34)
    process.send_signal(end)
    errors = process.stderr(120)
    assert process.returncode == 128 + end
    kept = read_checkpoint(run).round
    assert errors == f"fedflame: {ENDS[end]}; the same command with --resume goes on after round {kept}\n"
    assert kept < 3
    assert "<html" in (run / "report.html").read_text()
    assert not (run / ".lock").exists()
    assert start(tiny_folder, run, "--resume").wait(90) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert state_bytes(run) == state_bytes(finished)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_worker_processes_change_no_byte(
    workers: int, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run_experiment(prepare(tiny_config(tiny_folder, tmp_path / "run")), workers=workers)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)
    assert state_bytes(tmp_path / "run") == state_bytes(finished)
    assert timeless(tmp_path / "run") == timeless(finished)


def start(model: Path, run: Path, *flags: str) -> CliProcess:
    """`fedflame run` as a process of its own."""
    return start_cli(*arguments(model, run), *flags)
