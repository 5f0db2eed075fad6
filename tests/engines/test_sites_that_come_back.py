"""Sites that are gone: waited for once, named in a line, and asked again as soon as they are back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.engines.driver_here import LEARNED, answer, driver, honest, updates
from tests.engines_here import ThreadEngine

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient", "whole")]


def test_a_site_that_is_gone_is_waited_for_once_and_used_again_when_it_is_back(tmp_path: Path) -> None:
    with driver(honest, tmp_path, rejoin_timeout=0.5) as hub:
        hub.engine.reachable.discard("south")
        start = time.monotonic()
        answers = hub.round()
        assert answers[1].failure == "not connected" and time.monotonic() - start >= 0.5
        assert hub.heard("south: not connected")
        start = time.monotonic()
        assert hub.round()[1].failure == "not connected" and time.monotonic() - start < 0.5
        hub.engine.reachable.add("south")
        assert updates(hub.round()) == LEARNED
        assert len(hub.engine.jobs) == 2, "a new job reaches the site that came back"


def test_a_site_that_is_back_is_asked_at_once_and_not_after_all_others_have_answered(tmp_path: Path) -> None:
    asked, in_time = threading.Event(), list[bool]()

    def answer_after_south(site: str, request: bytes) -> bytes:
        if site == "south":
            asked.set()
        elif "south" in hubs[0].engine.reachable:
            in_time.append(asked.wait(3))
        return answer(request)

    with driver(answer_after_south, tmp_path, rejoin_timeout=0) as hub:
        hubs = [hub]
        hub.engine.reachable.discard("south")
        assert updates(hub.round()) == [LEARNED[0], b"", LEARNED[2]]
        assert updates(hub.round()) == [LEARNED[0], b"", LEARNED[2]]
        assert len(hub.engine.jobs) == 1, "nobody is back: the job stays"
        hub.engine.reachable.add("south")
        assert updates(hub.round()) == LEARNED
        assert in_time == [True, True] and len(hub.engine.jobs) == 2


def test_a_site_that_comes_back_within_the_round_still_takes_part_in_it(tmp_path: Path) -> None:
    with driver(honest, tmp_path, rejoin_timeout=20) as hub:
        hub.engine.reachable.discard("south")
        threading.Timer(0.3, hub.engine.reachable.add, ["south"]).start()
        start = time.monotonic()
        assert updates(hub.round()) == LEARNED
        assert time.monotonic() - start < 10, "it is looked for all the time"


def test_at_the_end_of_a_rounds_time_a_site_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    with driver(honest, tmp_path, rejoin_timeout=20, round_timeout=0.5) as hub:
        hub.engine.reachable.discard("south")
        assert [got.failure for got in hub.round()] == ["", "not connected", ""]
        assert hub.clients._patience["train"].wait("south", 1.0) is None, "to be gone is not to be slow"


@pytest.mark.slow
def test_a_site_that_is_back_does_not_interrupt_those_that_work(tmp_path: Path) -> None:
    asked = Counter[str]()

    def slow_north(site: str, request: bytes) -> bytes:
        asked[site] += 1
        time.sleep(0.6 if site == "north" else 0)
        return answer(request)

    with driver(slow_north, tmp_path, rejoin_timeout=20) as hub:
        hub.engine.reachable.discard("south")
        threading.Timer(0.2, hub.engine.reachable.add, ["south"]).start()
        assert updates(hub.round()) == LEARNED
    assert asked == {"north": 1, "south": 1, "west": 1}


@pytest.mark.slow
def test_a_site_that_was_back_is_waited_for_again_when_it_is_gone_again(tmp_path: Path) -> None:
    with driver(honest, tmp_path, rejoin_timeout=0.5) as hub:
        hub.engine.reachable.discard("south")
        hub.round()
        hub.engine.reachable.add("south")
        hub.round()
        hub.engine.reachable.discard("south")
        start = time.monotonic()
        assert hub.round()[1].failure == "not connected" and time.monotonic() - start >= 0.5


def test_where_no_site_is_waited_for_a_round_takes_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.REJOIN_POLL_SECONDS", 30.0)
    with driver(honest, tmp_path, rejoin_timeout=0) as hub:
        hub.engine.reachable.discard("south")
        start = time.monotonic()
        assert hub.round()[1].failure == "not connected" and time.monotonic() - start < 10


@pytest.mark.slow
def test_the_engine_is_asked_who_is_there_only_where_somebody_is_not_and_not_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask may start a process."""
    monkeypatch.setattr("fedflame.engines.clients.REJOIN_POLL_SECONDS", 0.2)
    asked: list[float] = []

    class Asked(ThreadEngine):
        def connected(self) -> set[str]:
            asked.append(time.monotonic())
            return super().connected()

    with driver(honest, tmp_path, engine=Asked, rejoin_timeout=0.5) as hub:
        assert updates(hub.round()) == updates(hub.round()) == LEARNED
        assert not asked
        hub.engine.reachable.discard("south")
        hub.round()
        assert 2 <= len(asked) <= 5
