"""Runs and rounds that a site counts: once each, whatever is retried and whatever dies."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer_asked import RUN, Make, Told, request

from fedflame.errors import UserError
from fedflame.messages import RoundPlan
from fedflame.trainer import ledger
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.ledger import FILE_NAME, Round, begin_round, read_ledger, require_allowed_number
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import SiteLimits

DAY = 86400.0


def test_a_site_takes_part_in_as_many_runs_as_it_allows_also_after_its_own_end(
    make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    limits = "[limits]\nmax_runs = 2\n"
    for run in ("aa" * 16, "bb" * 16, "aa" * 16):
        asked = request(job, replace(plan, round=3), run=run)
        assert make_service(limits).answer(asked).header["kind"] == "update"
    told.clear()
    service = make_service(limits)
    refused = service.answer(request(job, plan, run="cc" * 16))
    assert refused.header["kind"] == "refused"
    assert refused.header["reason"] == "this site has taken part in 2 runs; it allows at most 2"
    assert not told.heard("loading")
    assert service.answer(request(job, plan, run="bb" * 16)).header["kind"] == "update"


def test_a_site_trains_as_many_rounds_in_a_day_as_it_allows_and_a_plan_that_comes_again_is_no_other_round(
    make_service: Make, job: TrainingJob, plan: RoundPlan, told: Told, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    now = [1e9]
    monkeypatch.setattr("fedflame.trainer.service.time.time", lambda: now[0])
    limits = "[limits]\nmax_rounds_per_day = 2\n"
    service = make_service(limits)
    first, second, third = (request(job, replace(plan, round=number)) for number in (1, 2, 3))
    bodies = [service.answer(asked).body for asked in (first, second, second)]
    assert bodies[1] == bodies[2] != b""
    assert service.answer(first).body == bodies[0], "it is trained again, and counted once"
    assert told.heard("trained in") == 3
    now[0] += DAY - 1
    refused = make_service(limits).answer(third)
    assert refused.header["kind"] == "refused"
    assert refused.header["reason"] == "this site has trained 2 rounds in 24 hours; it allows at most 2"
    assert make_service(limits).answer(second).body == bodies[1]
    now[0] += 2
    assert service.answer(third).header["kind"] == "update"


def test_a_round_is_on_the_disk_before_its_training_begins(
    make_service: Make, job: TrainingJob, plan: RoundPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed in the training has counted it, and the same plan is counted once."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)

    def killed(*arguments: Any) -> None:
        assert synced and len(read_ledger(tmp_path / "state" / FILE_NAME)) == 1
        raise KeyboardInterrupt

    limits = "[limits]\nmax_rounds_per_day = 1\n"
    with monkeypatch.context() as patch:
        patch.setattr("fedflame.trainer.work.fine_tune", killed)
        with pytest.raises(KeyboardInterrupt):
            make_service(limits).answer(request(job, plan))
    service = make_service(limits)
    assert service.answer(request(job, replace(plan, round=3))).header["kind"] == "refused"
    assert service.answer(request(job, plan)).header["kind"] == "update"
    assert [known.run for known in read_ledger(tmp_path / "state" / FILE_NAME)] == [RUN]


def test_what_is_refused_is_not_counted(
    make_service: Make, job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    service = make_service("[limits]\nmax_steps = 2\nmax_runs = 1\n")
    service.answer(request(job, plan, run="cd" * 16))
    assert read_ledger(tmp_path / "state" / FILE_NAME) == []
    assert service.answer(request(job, replace(plan, max_steps=2))).header["kind"] == "update"


@given(st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_a_ledger_that_a_crash_cut_has_the_whole_lines_and_goes_on(tmp_path_factory: Any, cut: int) -> None:
    folder = tmp_path_factory.mktemp("state")
    for number in range(3):
        begin_round(folder, Round(RUN, f"{number:032x}", 1e9), SiteLimits())
    content = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    assert len(read_ledger(folder / FILE_NAME)) == whole
    begin_round(folder, Round(RUN, "f" * 32, 1e9), SiteLimits())
    plans = [known.plan for known in read_ledger(folder / FILE_NAME)]
    assert plans == [f"{number:032x}" for number in range(whole)] + ["f" * 32]


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "7", '{"run": "a"}', '{"run": 1, "plan": "b", "time": 1.0}',
     '{"run": "a", "plan": "b", "time": true}', '{"run": "a", "plan": "b", "time": 1.0, "more": 1}',
     '{"run": "a", "plan": "b", "time": 1.0, "kind": "rest"}',
     '{"run": "a", "plan": "b", "time": 1.0, "kind": 1}',
     "[" * 100_000],
)  # fmt: skip
def test_a_ledger_with_a_line_that_is_none_lets_nothing_be_trained(
    line: str, make_service: Make, job: TrainingJob, plan: RoundPlan, tmp_path: Path, told: Told
) -> None:
    service = make_service()
    begin_round(tmp_path / "state", Round(RUN, "0" * 32, 1e9), SiteLimits())
    path = tmp_path / "state" / FILE_NAME
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"ledger\.jsonl, line 2: no record of a round"):
        read_ledger(path)
    answer = service.answer(request(job, plan))
    assert answer.header["kind"] == "failed" and "ledger.jsonl, line 2" in answer.header["reason"]
    assert not told.heard("loading")


def test_a_line_from_before_there_were_evaluations_is_a_round_of_training(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"run": "a", "plan": "b", "time": 1.0}\n')
    assert read_ledger(tmp_path / FILE_NAME) == [Round("a", "b", 1.0, "train")]


def test_a_ledger_that_cannot_be_written_or_read_lets_nothing_be_trained(
    make_service: Make, job: TrainingJob, plan: RoundPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    service = make_service()
    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "fsync", full)
        answer = service.answer(request(job, plan))
    assert answer.header["kind"] == "failed"
    path = tmp_path / "state" / FILE_NAME
    assert answer.header["reason"] == f"{path}: cannot be written: No space left on device"
    (tmp_path / "state" / FILE_NAME).unlink()
    (tmp_path / "state" / FILE_NAME).mkdir()
    answer = service.answer(request(job, plan))
    assert answer.header["kind"] == "failed" and "cannot be read" in answer.header["reason"]


def test_a_clock_that_was_set_back_makes_no_round_uncounted() -> None:
    rounds = [Round("a", "p", 5 * DAY)]
    require_allowed_number(rounds, "a", SiteLimits(max_rounds_per_day=1), 6 * DAY)
    with pytest.raises(Refusal, match="1 rounds in 24 hours"):
        require_allowed_number(rounds, "a", SiteLimits(max_rounds_per_day=1), 1 * DAY)


def test_lines_are_json_that_others_can_read(tmp_path: Path) -> None:
    begin_round(tmp_path, Round(RUN, "0" * 32, 1e9), SiteLimits())
    (line,) = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(line).keys() == {field.name for field in fields(Round)}
