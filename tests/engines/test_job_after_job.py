"""Jobs of an engine that end, fail, never start or say strange things, and who may not pose as one."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.engines.driver_here import LEARNED, Driver, answer, driver, honest, updates
from tests.engines_here import ThreadEngine

from fedflame.engines.link import HubLink
from fedflame.errors import UserError
from fedflame.wire.envelope import receive

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient", "whole")]


def test_after_the_end_of_a_job_the_next_is_asked_for_what_is_open_only(tmp_path: Path) -> None:
    asked = Counter[str]()
    hubs: list[Driver] = []

    def crash_once(site: str, request: bytes) -> bytes:
        asked[site] += 1
        if site != "north" and len(hubs[0].engine.jobs) == 1:
            time.sleep(0.3)  # north has answered by then
            hubs[0].engine.end("job-1", "FINISHED:EXECUTION_EXCEPTION")
        return answer(request)

    with driver(crash_once, tmp_path) as hub:
        hubs.append(hub)
        assert updates(hub.round()) == LEARNED
        assert asked == {"north": 1, "south": 2, "west": 2}
        assert hub.heard("job job-1 is over: FINISHED:EXECUTION_EXCEPTION")


def test_job_after_job_that_fails_ends_the_run_with_what_is_kept(tmp_path: Path) -> None:
    hubs: list[Driver] = []

    def crash(site: str, request: bytes) -> bytes:
        hubs[0].engine.end(f"job-{len(hubs[0].engine.jobs)}", "FINISHED:EXECUTION_EXCEPTION")
        return answer(request)

    with driver(crash, tmp_path, max_resubmissions=2) as hub:
        hubs.append(hub)
        with pytest.raises(UserError, match=r"3 jobs ended one after another .* --resume goes on"):
            hub.round()
        assert len(hub.engine.jobs) == 3


def test_a_job_that_fails_in_every_round_is_not_one_that_fails_again_and_again(tmp_path: Path) -> None:
    hubs: list[Driver] = []
    crashed: set[int] = set()

    def crash_once_a_round(site: str, request: bytes) -> bytes:
        number = len(hubs[0].tokens)
        if number not in crashed:
            crashed.add(number)
            hubs[0].engine.end(f"job-{len(hubs[0].engine.jobs)}", "FINISHED:EXECUTION_EXCEPTION")
        return answer(request)

    with driver(crash_once_a_round, tmp_path, max_resubmissions=1) as hub:
        hubs.append(hub)
        for _ in range(3):
            assert updates(hub.round()) == LEARNED
        assert len(hub.engine.jobs) == 4


class Closed(ThreadEngine):
    def submit(self, hub_socket: Path, job_key: str) -> str:
        raise OSError("not authorized to submit")


class Silent(ThreadEngine):
    def submit(self, hub_socket: Path, job_key: str) -> str:
        return "silent"


class Stillborn(Silent):
    def ended(self, job: str) -> str | None:
        return "FAILED_TO_RUN"


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (Closed, "the engine did not take the job: not authorized to submit"),
        (Silent, "did not say a word in time"),
        (Stillborn, "is over before its first word: FAILED_TO_RUN"),
    ],
)
def test_an_engine_that_starts_no_job_is_tried_again_and_then_given_up(
    engine: type[ThreadEngine], words: str, tmp_path: Path
) -> None:
    stop = engine.stop
    engine.stop = lambda self, job: stop(self, job) if job in self.jobs else None  # type: ignore[method-assign]
    with driver(honest, tmp_path, engine=engine, max_resubmissions=1, start_timeout=0.2) as hub:
        with pytest.raises(UserError, match="2 jobs ended"):
            hub.round()
        assert sum(words in line for line in hub.said) == 2


def test_between_jobs_that_fail_the_driver_waits_longer_and_longer_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=naps.append)
    monkeypatch.setattr("fedflame.engines.clients.time", clock)
    monkeypatch.setattr("fedflame.engines.clients.BACKOFF_SECONDS", 2.0)
    with driver(honest, tmp_path, engine=Closed, max_resubmissions=6) as hub, pytest.raises(UserError):
        hub.round()
    assert naps == [2.0, 4.0, 6.0, 8.0, 10.0, 10.0, 10.0]


class Strange(ThreadEngine):
    """Says of itself, before each answer, what no engine says."""

    def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
        for header in (
            {"kind": "sites"},
            {"kind": "sites", "sites": None},
            {"kind": "sites", "sites": [["north"], 7]},
            {"kind": ["sites"]},
            {"kind": "answered", "ticket": [ticket], "site": "\x1b[2J"},
            {"kind": "failed", "ticket": {"a": 1}, "reason": None},
        ):
            link._send(header)
        super()._carry(link, sites, ticket, site, content)


def test_whatever_an_engine_says_of_itself_the_answers_count(tmp_path: Path) -> None:
    with driver(honest, tmp_path, engine=Strange) as hub:
        assert updates(hub.round()) == LEARNED
        assert all(line.isprintable() for line in hub.said)


class Blind(ThreadEngine):
    """Cannot say who is connected."""

    def connected(self) -> set[str] | None:
        return None


def test_an_engine_that_cannot_say_who_is_there_is_not_started_again_for_who_is_not(tmp_path: Path) -> None:
    with driver(honest, tmp_path, engine=Blind) as hub:
        hub.engine.reachable.discard("south")
        for _ in range(2):
            assert [answer.failure for answer in hub.round()] == ["", "not connected", ""]
        assert len(hub.engine.jobs) == 1


class Mute(ThreadEngine):
    """Does not say which sites it reaches."""

    def _carry_all(self, link: HubLink, sites: set[str]) -> None:
        link.sites = lambda names: None  # type: ignore[method-assign]
        super()._carry_all(link, sites)


def test_a_job_that_has_not_said_whom_it_reaches_is_let_work(tmp_path: Path) -> None:
    with driver(honest, tmp_path, engine=Mute) as hub:
        assert updates(hub.round()) == updates(hub.round()) == LEARNED
        assert len(hub.engine.jobs) == 1


def test_a_site_that_is_there_but_never_answers_does_not_cost_job_after_job(tmp_path: Path) -> None:
    """Its engine fails each time, such as where nobody has said where the trainer is."""

    class Misconfigured(ThreadEngine):
        def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
            if site == "south":
                link.failed(ticket, site, "its engine says there is no trainer")
            else:
                super()._carry(link, sites, ticket, site, content)

    with driver(honest, tmp_path, engine=Misconfigured, max_resubmissions=2) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], b"", LEARNED[2]]
        assert answers[1].failure == "its engine says there is no trainer"
        assert len(hub.engine.jobs) == 3


def test_a_process_of_another_user_is_sent_away_even_with_the_jobs_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says whose the process at the other end is; this one is told that it is another user's."""
    user = os.getuid()
    with driver(honest, tmp_path, max_resubmissions=0, start_timeout=0.2) as hub:
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        with pytest.raises(UserError, match="1 jobs ended"):
            hub.round()
        assert hub.heard("refused: a job that is not the one that was submitted last")
        assert hub.heard("job job-1 did not say a word in time")


def test_a_stranger_at_the_hubs_socket_is_sent_away(tmp_path: Path) -> None:
    with driver(honest, tmp_path) as hub:
        hub.round()
        path = hub.clients.engine_jobs._path
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
        link = HubLink(path, "not-the-job")
        assert link.next_request() is None
        assert hub.heard("refused: a job that is not the one that was submitted last")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(b"nonsense" * 10)
            with pytest.raises((EOFError, ConnectionResetError)):
                receive(connection)
        assert updates(hub.round()) == LEARNED
