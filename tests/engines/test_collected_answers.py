"""Answers of sites as the driver hands them on: in the order of the plans, once each, from memory or disk."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.engines.driver_here import LEARNED, SITES, answer, driver, honest, updates
from tests.engines_here import ThreadEngine

from fedflame.engines.link import HubLink
from fedflame.engines.requests import store
from fedflame.errors import UserError

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient", "whole")]


@pytest.mark.parametrize("memory", [0, 25, 10**6])  # of one answer, which has some 20 bytes
def test_answers_come_in_the_order_of_the_plans_whichever_site_is_first(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.ANSWER_MEMORY", memory)

    def slow_first(site: str, request: bytes) -> bytes:
        time.sleep(0.05 * (2 - SITES.index(site)))
        return answer(request)

    with driver(slow_first, tmp_path) as hub:
        assert updates(hub.round()) == LEARNED
        answers = hub.round()
        assert updates(answers) == LEARNED
        assert answers[0].seconds > 0.1 and all(got.seconds > 0 for got in answers)
        assert hub.tokens == [5] * 12, "two steps of half the tokens each, for three sites and two rounds"
        assert len(hub.engine.jobs) == 1
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"{site}.held" for site in SITES], "nothing that was on its way is left"


@pytest.mark.parametrize(("memory", "on_disk"), [(0, 2), (25, 1), (10**6, 0)])
def test_answers_wait_in_memory_as_far_as_it_goes_and_then_on_disk(
    memory: int, on_disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.ANSWER_MEMORY", memory)

    def north_last(site: str, request: bytes) -> bytes:
        time.sleep(0.2 if site == "north" else 0)
        return answer(request)

    with driver(north_last, tmp_path) as hub:
        answers = hub.clients.train([(client, b"a plan") for client in range(3)], hub.tokens.append)
        next(answers)
        assert len(list(tmp_path.glob("*.answer"))) == on_disk
        assert len(list(answers)) == 2 and not list(tmp_path.glob("*.answer"))


class Twice(ThreadEngine):
    def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
        super()._carry(link, sites, ticket, site, content)
        super()._carry(link, sites, ticket, site, content)


def test_an_answer_counts_once_however_often_it_comes(tmp_path: Path) -> None:
    with driver(honest, tmp_path, engine=Twice) as hub:
        assert updates(hub.round()) == updates(hub.round()) == LEARNED
        assert hub.heard("refused: a late or repeated answer of")


def test_of_two_answers_to_one_request_the_first_counts(tmp_path: Path) -> None:
    changed = threading.Event()

    class Changing(ThreadEngine):
        def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
            if site != "north":
                changed.wait(20)
            super()._carry(link, sites, ticket, site, content)
            if site == "north":
                link.answered(ticket, site, answer(content, steps=9).replace(b"learned", b"LEARNED"))
                changed.set()

    with driver(honest, tmp_path, engine=Changing) as hub:
        assert updates(hub.round()) == LEARNED
        assert hub.heard("refused: a late or repeated answer of north")
        assert hub.tokens == [5] * 6


def test_a_disk_of_the_hub_that_is_full_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with driver(honest, tmp_path) as hub:
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"cannot write 6 bytes: No space left on device; .*TMPDIR"):
            hub.round()


def test_a_site_that_is_left_out_is_sent_nothing_and_the_reason_stands_in_every_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    stored: list[str] = []

    def note(site: str, request: bytes) -> bytes:
        asked.append(site)
        return answer(request)

    def noted(path: Path, content: bytes) -> None:
        stored.append(path.name)
        store(path, content)

    monkeypatch.setattr("fedflame.engines.clients.store", noted)
    with driver(note, tmp_path) as hub:
        hub.clients.leave_out("south", "it affords less")
        for _ in range(2):
            assert [got.failure for got in hub.round()] == ["", "it affords less", ""]
        assert hub.heard("south is left out of all rounds: it affords less") and "south" not in asked
        assert stored == ["north.plan", "west.plan"] * 2, "nor is its plan written to the disk"
        assert len(hub.engine.jobs) == 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"steps": 10**9, "tokens": 10**9}, 1_000_000),
        ({"steps": 0}, 0),
        ({"steps": "2"}, 0),
        ({"tokens": None}, 0),
        ({"tokens": 1.5}, 0),
        ({"tokens": True}, 0),
        ({"steps": True}, 0),
        ({"steps": [2]}, 0),
    ],
)
def test_what_a_site_says_of_its_steps_shows_progress_and_no_more(
    said: dict[str, Any], told: int, tmp_path: Path
) -> None:
    with driver(lambda site, request: answer(request, **said), tmp_path) as hub:
        (got,) = hub.clients.train([(0, b"plan 0")], hub.tokens.append)
        assert got.update == LEARNED[0] and len(hub.tokens) == told
