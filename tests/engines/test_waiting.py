"""How long answers are waited for: until the round's time, the grace, or by what was taken before."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from tests.engines.driver_here import LEARNED, RUN, answer, driver, honest, updates

from fedflame.engines.requests import Request
from fedflame.wire.envelope import Envelope

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient", "whole")]


class Silence:
    """Three sites that answer; west does not while it is silent, and then answers late."""

    def __init__(self, kind: str = "update") -> None:
        self._kind = kind
        self._begun, self._over = threading.Event(), threading.Event()

    def __call__(self, site: str, request: bytes) -> bytes:
        if site == "west" and self._begun.is_set():
            self._over.wait(20)
        return answer(request, kind=self._kind)

    def begin(self) -> None:
        self._begun.set()

    def end(self) -> None:
        self._begun.clear()
        self._over.set()


@pytest.mark.slow
def test_a_site_without_an_answer_in_time_is_left_out_and_refused_when_it_is_late(tmp_path: Path) -> None:
    released = threading.Event()

    def late(site: str, request: bytes) -> bytes:
        if site == "south" and not released.is_set():
            released.wait(20)
        return answer(request)

    with driver(late, tmp_path, round_timeout=1) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], b"", LEARNED[2]]
        assert answers[1].failure == "no answer within 1 s (rounds.round_timeout)"
        assert answers[1].seconds >= 1
        released.set()
        time.sleep(0.1)
        assert updates(hub.round()) == LEARNED
        assert hub.heard("refused: a late or repeated answer of south")


def test_where_nobody_is_waited_for_any_longer_no_job_is_started(tmp_path: Path) -> None:
    with driver(honest, tmp_path, round_timeout=1e-9) as hub:
        assert updates(hub.round()) == [b"", b"", b""]
        assert not hub.engine.jobs


def test_with_a_quorum_the_others_have_the_grace_and_no_longer(tmp_path: Path) -> None:
    end = threading.Event()

    def stuck(site: str, request: bytes) -> bytes:
        if site == "west":
            end.wait(20)
        return answer(request)

    with driver(stuck, tmp_path, quorum=2, straggler_grace=0.3) as hub:
        start = time.monotonic()
        answers = hub.round()
        assert 0.3 <= time.monotonic() - start < 5
        assert updates(answers) == [LEARNED[0], LEARNED[1], b""]
        assert "straggler_grace" in answers[2].failure
        end.set()


@pytest.mark.slow
def test_the_grace_begins_with_the_quorum_and_not_before(tmp_path: Path) -> None:
    def slow(site: str, request: bytes) -> bytes:
        time.sleep(0 if site == "north" else 0.6)
        return answer(request)

    with driver(slow, tmp_path, quorum=3, straggler_grace=0.2) as hub:
        assert updates(hub.round()) == LEARNED


@pytest.mark.slow
def test_a_site_that_fell_silent_is_waited_for_by_what_it_took_and_again_once_it_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.3)
    west = Silence()
    with driver(west, tmp_path, quorum=2) as hub:
        assert updates(hub.round()) == LEARNED
        west.begin()
        for _ in range(2):
            answers = hub.round()
            assert updates(answers) == [LEARNED[0], LEARNED[1], b""]
            assert "by what was taken before (rounds.straggler_grace)" in answers[2].failure
            assert 0.3 <= answers[2].seconds < 10
        west.end()
        deadline = time.monotonic() + 20
        while hub.clients._patience["train"].wait("west", 1.0) < 0.9:  # type: ignore[operator]
            assert time.monotonic() < deadline, "the late answer counts, three times its 0.3 s or more"
            assert updates(hub.round()) == LEARNED


def test_what_it_takes_to_score_says_nothing_of_what_it_takes_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.3)
    west = Silence(kind="evaluation")
    with driver(west, tmp_path, quorum=2) as hub:
        plans = [(client, f"plan {client}".encode()) for client in range(3)]
        assert updates(list(hub.clients.evaluate(plans))) == LEARNED and hub.tokens == []
        patience = hub.clients._patience
        assert patience["train"].wait("west", 1.0) is None and patience["evaluate"].wait("west", 1.0) == 0.3
        west.begin()
        answers = list(hub.clients.evaluate(plans))
        assert updates(answers) == [LEARNED[0], LEARNED[1], b""]
        assert "by what was taken before (rounds.straggler_grace)" in answers[2].failure
        west.end()
        deadline = time.monotonic() + 20
        while patience["evaluate"].wait("west", 1.0) < 0.9:  # type: ignore[operator]
            assert time.monotonic() < deadline, "the late evaluation counts"
            assert updates(list(hub.clients.evaluate(plans))) == LEARNED


@pytest.mark.slow
def test_a_site_that_never_answered_is_waited_for_to_the_end_of_a_round_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.1)
    end = threading.Event()

    def stuck(site: str, request: bytes) -> bytes:
        if site == "west":
            end.wait(20)
        return answer(request)

    with driver(stuck, tmp_path, quorum=2, round_timeout=2) as hub:
        first, second = hub.round()[2], hub.round()[2]
        end.set()
    assert first.failure == "no answer within 2 s (rounds.round_timeout)"
    assert second.failure == "no answer within 0 s, by what was taken before (rounds.straggler_grace)"


@pytest.mark.slow
def test_without_a_quorum_nothing_that_was_learned_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.1)
    slow = threading.Event()

    def slower(site: str, request: bytes) -> bytes:
        time.sleep(0.6 if slow.is_set() else 0)
        return answer(request)

    with driver(slower, tmp_path, quorum=2) as hub:
        assert updates(hub.round()) == LEARNED
        slow.set()
        assert sum(map(bool, updates(hub.round()))) >= 2


@pytest.mark.slow
def test_a_grace_of_zero_waits_until_the_rounds_time_whatever_was_taken_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.1)
    slow = threading.Event()

    def slower(site: str, request: bytes) -> bytes:
        time.sleep(0.8 if slow.is_set() and site == "west" else 0)
        return answer(request)

    with driver(slower, tmp_path, quorum=1, straggler_grace=0) as hub:
        assert updates(hub.round()) == LEARNED
        slow.set()
        assert updates(hub.round()) == LEARNED


def test_a_late_answer_that_is_none_ends_nothing_and_teaches_nothing(tmp_path: Path) -> None:
    with driver(honest, tmp_path) as hub:
        for is_answer in (False, True):
            request = Request("west", "train", tmp_path / "west.plan", 100)
            hub.clients._give_up(request, "no answer in time")
            about = {"ticket": request.ticket, "site": "west"}
            late = Envelope(about | {"run": RUN, "kind": "update"}).to_bytes() if is_answer else b"garbage"
            hub.clients._take(Envelope(about | {"kind": "answered"}, late), [request])
            assert hub.said.pop() == "refused: a late or repeated answer of west"
            assert ("west" in hub.clients._patience["train"]._slowest) is is_answer
