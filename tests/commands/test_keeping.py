"""Runs that stop early and runs that keep each k's best round, undisturbed, killed and resumed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.held_out_losses import WITHOUT_ADAPTER, losses
from tests.same_bits import assert_same_adapter
from tests.tiny_runs import (
    ANSWERS,
    SETTINGS,
    arguments,
    events,
    invoke,
    set_options,
    start_cli,
    state_bytes,
    timeless,
    tiny_config,
    tiny_run,
    wait_for_lines,
)

import fedflame
from fedflame.errors import UserError
from fedflame.experiment.api import Run
from fedflame.report.live import live_page
from fedflame.report.records import read_run
from fedflame.run_files.checkpoints import Kept, best_kept, checkpoint_path, kept_rounds
from fedflame.server.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

NOISY = (
    "server.num_server_rounds=6",
    "training.learning_rate=0.1",
    "training.lr_scheduler_type=constant",
    "strategy.name=fedavg",
)
"""Losses of about 4.5 that rise and fall by 0.2 from round to round, so that tiers differ in their best."""
BEST = "server.load_best_model_at_end=true"
PATIENT = "server.early_stopping_patience=2"
FEDEX = ("strategy.name=fedex_lora", "seed=2")


@pytest.fixture(scope="module")
def best(undisturbed: Callable[..., Path]) -> Run:
    """Tiers with three different best rounds, or two, none of them among the last two."""
    return Run(undisturbed(*NOISY, BEST))


@pytest.fixture(scope="module")
def all_kept(undisturbed: Callable[..., Path]) -> Path:
    """The same rounds, every checkpoint kept, and nothing chosen."""
    return undisturbed(*NOISY, "server.save_total_limit=100")


def by_hand(run: Path) -> dict[int, int]:
    """The rounds with the least held-out loss, by k."""
    lines = [e for e in events(run, "evaluation") if e["category"] is None]
    tiers = {line["active_experts"] for line in lines}
    mine = {
        k: [(line["loss"], line["round"]) for line in lines if line["active_experts"] == k] for k in tiers
    }
    return {k: min(of_k)[1] for k, of_k in mine.items()}


def test_each_k_has_the_adapter_of_its_best_round(best: Run, all_kept: Path) -> None:
    rounds = by_hand(best.folder)
    assert best.best_rounds == best.used_rounds == rounds == by_hand(all_kept)
    assert len({*rounds.values()}) > 1 and 6 not in rounds.values(), (
        "the run must be one that tells them apart"
    )
    assert {*kept_rounds(best.folder), *best_kept(best.folder)} == {5, 6, *rounds.values()}
    for k, number in rounds.items():
        state = read_checkpoint(all_kept, number).state
        assert_same_adapter(best.adapter(k), state.total_at(k))
        assert best.rescaler(k) == state.rescalers[k].tolist()
    assert_same_adapter(best.adapter(), best.adapter(4))
    undecided = Run(all_kept)
    assert undecided.best_rounds == rounds and undecided.used_rounds == dict.fromkeys(rounds, 6)
    assert_same_adapter(undecided.adapter(1), read_checkpoint(all_kept).state.total_at(1))


def test_evaluate_and_the_adapter_folder_give_the_losses_of_the_best_rounds(best: Run) -> None:
    wanted = {k: best.scores[number][k]["loss"] for k, number in best.used_rounds.items()}
    assert losses(best.folder) == pytest.approx(wanted, rel=1e-6)
    assert losses(best.folder / "adapter", *WITHOUT_ADAPTER) == pytest.approx(wanted, rel=1e-6)
    assert wanted[1] != pytest.approx(best.scores[6][1]["loss"], rel=1e-3)


def test_with_merged_factors_each_k_has_those_of_its_round(
    undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    run = Run(undisturbed(*NOISY, BEST, *FEDEX))
    rounds = by_hand(run.folder)
    assert run.used_rounds == rounds and len({*rounds.values()}) > 1
    wanted = {k: run.scores[number][k]["loss"] for k, number in rounds.items()}
    assert losses(run.folder) == pytest.approx(wanted, rel=1e-6)
    assert len({run.adapter(k).rank for k in rounds}) > 1, "what is merged grows from round to round"
    plain = [setting for setting in (*SETTINGS, "seed=2") if "adapter" not in setting]
    settings = set_options(*plain)
    assert losses(run.folder / "adapter", *settings) == pytest.approx(wanted, rel=1e-5)
    least = min(rounds)
    options = ("--merge", "--active-experts", str(least), "--check")
    result = invoke("export", run.folder, "--to", tmp_path / "merged", *options)
    assert result.exit_code == 0, result.stderr
    settings = set_options(*(setting for setting in plain if "clients" not in setting))
    merged = losses(tmp_path / "merged", "--active-experts", str(least), *settings)
    assert merged == pytest.approx({least: wanted[least]}, rel=1e-4)


def test_report_card_export_and_console_name_the_rounds(best: Run, tmp_path: Path) -> None:
    words = "; ".join(f"k = {k}: round {number} of 6" for k, number in sorted(best.used_rounds.items())[::-1])
    shown = invoke("evaluate", best.folder).stdout
    assert f"best rounds, which are used: {words}" in shown
    result = invoke("export", best.folder, "--to", tmp_path / "adapter", "--check")
    assert result.exit_code == 0 and words in result.stdout
    assert words in (tmp_path / "adapter" / "README.md").read_text()
    facts = json.loads((tmp_path / "adapter" / "fedflame.json").read_text())
    assert facts["best_rounds"] == {str(k): number for k, number in best.used_rounds.items()}
    report = best.report.read_text()
    for k, number in best.used_rounds.items():
        assert f"<td>{number} of 6</td>" in report
        assert f'">{best.scores[number][k]["loss"]:.2f}</span>' in report
    assert "the best round of each k" in report
    assert [(e["round"], e["active_experts"]) for e in events(best.folder, "best")][-1:] != []


def folder_bytes(run: Path) -> dict[str, bytes]:
    """All adapters of the adapter folder."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("adapter/**/*.safetensors")}


@pytest.mark.timeout(240)
def test_killed_at_any_instant_it_ends_in_the_same_bytes(
    best: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    run, rng = tmp_path / "killed", random.Random(time.time_ns())
    goals = sorted(rng.sample(range(2, len(timeless(best.folder)) - 2), 2))
    command = arguments(tiny_folder, run, *NOISY, BEST)
    for number, goal in enumerate(goals):
        process = start_cli(*command, *(["--resume"] if number else []))
        wait_for_lines(process, run, goal)
        time.sleep(rng.random() * 0.05)
        process.kill()
        assert process.wait(20) == -signal.SIGKILL, f"goals {goals}"
    assert start_cli(*command, "--resume").wait(90) == 0, f"goals {goals}"
    assert_same_run(run, best.folder)


def assert_same_run(run: Path, other: Path) -> None:
    assert timeless(run) == timeless(other)
    assert state_bytes(run) == state_bytes(other)
    assert folder_bytes(run) == folder_bytes(other)
    assert best_kept(run) == best_kept(other)


@pytest.mark.parametrize("limit", [2, 4])
def test_from_a_round_before_or_after_the_best_it_ends_in_the_same_bytes(
    best: Run, tiny_folder: Path, tmp_path: Path, limit: int
) -> None:
    """With four kept, the oldest of them is before a best round; with two it is after all."""
    run, settings = tmp_path / "run", (*NOISY, BEST, f"server.save_total_limit={limit}")
    tiny_run(tiny_folder, run, *settings)
    oldest = kept_rounds(run)[0]
    assert (oldest < max(best.best_rounds.values())) == (limit == 4)
    result = invoke(*arguments(tiny_folder, run, *settings), "--resume-from", str(oldest))
    assert result.exit_code == 0, result.stderr
    assert timeless(run) == timeless(best.folder) and folder_bytes(run) == folder_bytes(best.folder)


def test_a_best_round_that_is_damaged_or_lost_is_refused_before_anything_is_trained(
    best: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(best.folder, run)
    path = checkpoint_path(run, best_kept(run)[0])
    whole = path.read_bytes()
    for content in (whole[:-1], None):
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(UserError, match=rf"{path.stem.partition('-')[2]}.sealed: "):
            tiny_run(tiny_folder, run, *NOISY, BEST, existing="resume")
        command = arguments(tiny_folder, run, *NOISY, BEST)
        result = invoke(*command, "--resume-from", "5")
        assert result.exit_code == 2 and f"-{path.stem.partition('-')[2]}.sealed" in result.stderr
        assert kept_rounds(run) == [5, 6], "nothing was given up for what cannot end"
        result = invoke("evaluate", run)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def stopped(undisturbed: Callable[..., Path]) -> Path:
    return undisturbed(*NOISY, PATIENT, BEST)


def test_a_run_stops_after_so_many_evaluations_without_a_better_mean(stopped: Path, all_kept: Path) -> None:
    lines = [e for e in events(all_kept, "evaluation") if e["category"] is None]
    means = [sum(e["loss"] for e in lines if e["round"] == number) / 3 for number in range(7)]
    wanted = next(n for n in range(2, 7) if min(means[: n - 1]) <= min(means[n - 1 : n + 1]))
    assert wanted < 6
    stop = events(stopped, "stopped")
    assert [one["round"] for one in stop] == [wanted] and kept_rounds(stopped)[-1] == wanted
    best_mean = min(range(wanted + 1), key=means.__getitem__)
    reason = (
        f"the mean loss over all k did not improve in the last 2 evaluations; the best was round {best_mean}"
    )
    assert stop[0]["reason"] == reason
    report = (stopped / "report.html").read_text()
    assert f"The run stopped after round {wanted}: {reason}." in report and "stopped early" in report


def test_a_stopped_run_has_ended_and_goes_on_with_more_patience(
    stopped: Path, best: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    last = kept_rounds(run)[-1]
    shutil.rmtree(run / "adapter")  # as after a kill between the last checkpoint and the adapter
    result = invoke(*arguments(tiny_folder, run, *NOISY, PATIENT, BEST), "--resume")
    assert result.exit_code == 0
    assert f"the run has ended after round {last}\n" in result.stdout
    assert "--resume with a larger server.early_stopping_patience goes on" in result.stdout
    assert timeless(run) == timeless(stopped) and folder_bytes(run) == folder_bytes(stopped)
    more = "server.early_stopping_patience=100"
    result = invoke(*arguments(tiny_folder, run, *NOISY, more, BEST), "--resume")
    assert result.exit_code == 0 and "has ended" not in result.stdout
    assert folder_bytes(run) == folder_bytes(best.folder) and state_bytes(run) == state_bytes(best.folder)
    assert "stopped early" not in (run / "report.html").read_text()


def test_rounds_that_are_not_evaluated_do_not_count(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run(
        tiny_folder, run, *NOISY, BEST, "server.early_stopping_patience=1", "evaluation.evaluate_every=2"
    )
    evaluated = {e["round"] for e in events(run, "evaluation")}
    assert {*Run(run).used_rounds.values()} <= evaluated <= {0, 2, 4, 6}
    assert {e["round"] for e in events(run, "stopped")} <= {2, 4}


def test_by_a_score_of_answers_only_rounds_with_answers_count(tiny_folder: Path, tmp_path: Path) -> None:
    settings = ("server.metric_for_best_model=rouge_l", "evaluation.generate_every=2", ANSWERS)
    tiny_run(tiny_folder, tmp_path / "run", *NOISY, BEST, *settings)
    run = Run(tmp_path / "run")
    assert {*run.used_rounds.values()} <= {0, 2, 4, 6}
    for k, number in run.used_rounds.items():
        taken = [scores[k]["rouge_l"] for scores in run.scores.values() if scores[k]["rouge_l"] is not None]
        assert run.scores[number][k]["rouge_l"] == max(taken)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ((BEST, "evaluation.evaluate_every=0"), "evaluation.evaluate_every = 0 measures no round between"),
        ((PATIENT, "evaluation.evaluate_every=0"), "server.early_stopping_patience = 2: evaluation.evaluate"),
        (("server.metric_for_best_model=exact_match",), "answers must be generated"),
        (
            (BEST, ANSWERS, "server.metric_for_best_model=rouge_l"),
            "evaluation.generate_every = 0 measures no round between",
        ),
        (("server.metric_for_best_model=accuracy",), "'loss', 'exact_match' or 'rouge_l'"),
        (("server.early_stopping_patience=-1",), "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tmp_path: Path, settings: tuple[str, ...], wanted: str
) -> None:
    with pytest.raises(UserError, match=wanted):
        tiny_config(tmp_path, tmp_path / "run", *settings)


def test_the_model_before_training_can_be_best(tiny_folder: Path, tmp_path: Path) -> None:
    settings = ("training.learning_rate=30", "server.num_server_rounds=1")
    run = fedflame.run(tiny_config(tiny_folder, tmp_path / "run", BEST, *settings))
    assert {*run.used_rounds.values()} == {0}
    assert all(
        torch.equal(value, torch.zeros_like(value)) for n, value in run.adapter(1).experts.items() if "B" in n
    )
    assert "<td>0 of 1</td>" in run.report.read_text()


def test_lines_of_a_round_that_is_not_kept_make_no_round_the_best(all_kept: Path) -> None:
    """They are of a run that was killed before the round's checkpoint."""
    recorded = read_run(all_kept)
    lines = [e for e in events(all_kept, "evaluation") if e["category"] is None]
    found = set()
    for number in range(7):
        upto = [(e["loss"], e["round"]) for e in lines if e["round"] <= number and e["active_experts"] == 4]
        best_then = replace(recorded, kept=Kept(number, 0)).best_rounds[4]
        assert best_then == min(upto)[1]
        found.add(best_then)
    assert len(found) > 2


def test_the_live_page_knows_that_a_stopped_run_is_finished(stopped: Path) -> None:
    page = live_page(stopped)()
    last = kept_rounds(stopped)[-1]
    assert "Finished." in page and f"It stopped after round {last} of 6: the mean loss" in page


def test_a_run_that_waited_until_its_last_round_has_not_stopped(
    stopped: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    rounds = f"server.num_server_rounds={kept_rounds(stopped)[-1]}"
    tiny_run(tiny_folder, tmp_path / "run", *NOISY, PATIENT, BEST, rounds)
    assert events(tmp_path / "run", "stopped") == []
