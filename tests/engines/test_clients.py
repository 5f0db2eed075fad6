"""The driver against engines and sites that misbehave; what sites say here is a few bytes, no update."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.engines_here import Deliver, ThreadEngine
from tests.message_samples import a_plan

from fedflame.clients.answers import Answer
from fedflame.engines.clients import EngineClients
from fedflame.engines.hub import HubRounds
from fedflame.engines.jobs import EngineJobs, engine_jobs
from fedflame.engines.link import HubLink
from fedflame.engines.requests import Request, store
from fedflame.errors import UserError
from fedflame.wire.addition import decode_addition, encode_addition, plan_digest
from fedflame.wire.codec import encode_plan, encoded_update_limit, update_limit
from fedflame.wire.envelope import LONGEST_BEFORE_BODY, Envelope, receive

SITES = ["north", "south", "west"]
RUN = "0123456789abcdef" * 2
LARGE = (3, 40, 4, 30, 20)
"""Of an adapter beside which names and scalars are little."""
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("whole")]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.engines.clients.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("fedflame.engines.clients.POLL_SECONDS", 0.02)
    monkeypatch.setattr("fedflame.engines.clients.REJOIN_POLL_SECONDS", 0.02)
    monkeypatch.setattr("fedflame.engines.jobs.POLL_SECONDS", 0.02)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of a few bytes that are no plans: nothing of them is held by a site, and any answer fits."""
    monkeypatch.setattr("fedflame.engines.clients.encode_addition", lambda plan, held: None)
    monkeypatch.setattr("fedflame.engines.clients.encoded_update_limit", lambda plan: 10**6)
    monkeypatch.setattr("fedflame.engines.clients.encoded_plan_work", lambda plan: 1.0)


def answer(request: bytes, **changes: Any) -> bytes:
    """What an honest site says, or with other fields."""
    asked = Envelope.from_bytes(request)
    header = {name: asked.header[name] for name in ("ticket", "run", "site")}
    header |= {"kind": "update", "steps": 2, "tokens": 10} | changes
    return Envelope(header, b"learned from " + asked.body).to_bytes()


def honest(site: str, request: bytes) -> bytes:
    return answer(request)


DESCRIPTION = {
    "kind": "description",
    "num_examples": 7,
    "active_experts": 2,
    "max_active_experts": 2,
    "held": "",
}


def described(request: bytes, **changes: Any) -> bytes:
    """What an honest site says of itself, or with other fields."""
    return answer(request, **{**DESCRIPTION, **changes})


@dataclass
class Driver:
    clients: EngineClients
    engine: ThreadEngine
    said: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def round(self) -> list[Answer]:
        plans = [(client, f"plan {client}".encode()) for client in range(len(SITES))]
        return list(self.clients.train(plans, self.tokens.append))

    def heard(self, words: str) -> bool:
        return any(words in line for line in self.said)


@contextmanager
def driver(
    deliver: Deliver,
    tmp_path: Path,
    quorum: int = 1,
    engine: type[ThreadEngine] = ThreadEngine,
    **rounds: Any,
) -> Iterator[Driver]:
    carrier, said = engine(deliver, set(SITES)), list[str]()
    with engine_jobs(carrier, said.append) as jobs:
        limits = HubRounds(**{"rejoin_timeout": 0.1, **rounds})
        clients = EngineClients(carrier, jobs, RUN, {}, SITES, limits, quorum, tmp_path, said.append)
        yield Driver(clients, carrier, said)


LEARNED = [b"learned from plan 0", b"learned from plan 1", b"learned from plan 2"]


def updates(answers: list[Answer]) -> list[bytes]:
    return [answer.update for answer in answers]


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


def test_the_grace_begins_with_the_quorum_and_not_before(tmp_path: Path) -> None:
    def slow(site: str, request: bytes) -> bytes:
        time.sleep(0 if site == "north" else 0.6)
        return answer(request)

    with driver(slow, tmp_path, quorum=3, straggler_grace=0.2) as hub:
        assert updates(hub.round()) == LEARNED


def test_a_site_that_fell_silent_is_waited_for_by_what_it_took_and_again_once_it_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.3)
    silent, end = threading.Event(), threading.Event()

    def falls_silent(site: str, request: bytes) -> bytes:
        if site == "west" and silent.is_set():
            end.wait(20)
        return answer(request)

    with driver(falls_silent, tmp_path, quorum=2) as hub:
        assert updates(hub.round()) == LEARNED
        silent.set()
        for _ in range(2):
            answers = hub.round()
            assert updates(answers) == [LEARNED[0], LEARNED[1], b""]
            assert "by what was taken before (rounds.straggler_grace)" in answers[2].failure
            assert 0.3 <= answers[2].seconds < 10
        silent.clear()
        end.set()
        deadline = time.monotonic() + 20
        while hub.clients._patience["train"].wait("west", 1.0) < 0.9:  # type: ignore[operator]
            assert time.monotonic() < deadline, "the late answer counts, three times its 0.3 s or more"
            assert updates(hub.round()) == LEARNED


def test_what_it_takes_to_score_says_nothing_of_what_it_takes_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.3)
    silent, end = threading.Event(), threading.Event()

    def scores(site: str, request: bytes) -> bytes:
        if site == "west" and silent.is_set():
            end.wait(20)
        return answer(request, kind="evaluation")

    with driver(scores, tmp_path, quorum=2) as hub:
        plans = [(client, f"plan {client}".encode()) for client in range(3)]
        assert updates(list(hub.clients.evaluate(plans))) == LEARNED and hub.tokens == []
        patience = hub.clients._patience
        assert patience["train"].wait("west", 1.0) is None and patience["evaluate"].wait("west", 1.0) == 0.3
        silent.set()
        answers = list(hub.clients.evaluate(plans))
        assert updates(answers) == [LEARNED[0], LEARNED[1], b""]
        assert "by what was taken before (rounds.straggler_grace)" in answers[2].failure
        silent.clear()
        end.set()
        deadline = time.monotonic() + 20
        while patience["evaluate"].wait("west", 1.0) < 0.9:  # type: ignore[operator]
            assert time.monotonic() < deadline, "the late evaluation counts"
            assert updates(list(hub.clients.evaluate(plans))) == LEARNED


def test_the_rows_to_score_are_those_that_sites_say_and_none_of_one_that_is_left_out(tmp_path: Path) -> None:
    def two_say(site: str, request: bytes) -> bytes:
        return described(request, **({"test_rows": 5} if site != "north" else {"kind": "update"}))

    with driver(two_say, tmp_path) as hub:
        hub.clients.describe()
        assert hub.clients.test_rows() == [None, 5, 5]
        hub.clients.leave_out("south", "it affords less")
        assert hub.clients.test_rows() == [None, 0, 5]


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


def test_a_site_that_does_not_describe_itself_costs_no_whole_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.3)
    end = threading.Event()

    def mute(site: str, request: bytes) -> bytes:
        if site == "west":
            end.wait(20)
        return described(request)

    with driver(mute, tmp_path) as hub:
        assert sorted(hub.clients.describe()) == ["north", "south"]
        end.set()
        assert hub.heard("west: no answer within 0 s")


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


OTHER_RUN = "f" * 32


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (lambda request: answer(request, run=OTHER_RUN), "its run is not the one that was asked for"),
        (lambda request: answer(request, ticket="0" * 32), "its ticket is not the one that was asked for"),
        (lambda request: answer(request, site="north"), "it is for south"),
        (lambda request: answer(request, kind="train"), "it is of kind 'train'"),
        (lambda request: b"garbage", "7 bytes that are no envelope"),
        (lambda request: answer(request)[:-1], "envelope of"),
    ],
)
def test_an_answer_that_is_not_to_this_request_is_refused(
    forge: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    """Replayed, of another run, in another site's name, damaged."""

    def forged(site: str, request: bytes) -> bytes:
        return forge(request) if site == "south" else answer(request)

    with driver(forged, tmp_path) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], b"", LEARNED[2]]
        assert answers[1].failure.startswith("its answer is refused: ")
        assert reason in answers[1].failure
        assert hub.heard("refused: an answer of south")


class Impostor(ThreadEngine):
    """The engine knows the sender of south's answer as north."""

    def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
        link.answered(ticket, "north", self.deliver(site, content))


def test_a_site_that_the_engine_knows_by_another_name_is_refused(tmp_path: Path) -> None:
    with driver(honest, tmp_path, engine=Impostor) as hub:
        assert updates(hub.round()) == [LEARNED[0], b"", b""]
        assert hub.heard("refused: an answer of north: it is for south")


def test_a_refusal_carries_the_sites_reason(tmp_path: Path) -> None:
    def strict(site: str, request: bytes) -> bytes:
        return (
            answer(request, kind="refused", reason="k = 8 is too much") if site == "west" else answer(request)
        )

    with driver(strict, tmp_path) as hub:
        assert hub.round()[2].failure == "the site refuses: k = 8 is too much"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["north.held", "south.held"]


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("a\ud800b", "a b"),
        ("\x1b]0;title\x07 \x1b[2Jall is\r\nwell", "]0;title [2Jall is well"),
        ("left \u202e right", "left right"),
        ("x" * 10**5, "x" * 997 + "..."),
        (None, "None"),
        (7, "7"),
        (True, "True"),
        (["\ud800"], "['\\ud800']"),
        ({"a": 1.5}, "{'a': 1.5}"),
    ],
)
@pytest.mark.parametrize("kind", ["refused", "failed"])
def test_whatever_a_site_gives_as_its_reason_is_one_line_that_can_be_shown(
    kind: str, reason: Any, shown: str, tmp_path: Path
) -> None:
    def rude(site: str, request: bytes) -> bytes:
        return answer(request, kind=kind, reason=reason) if site == "west" else answer(request)

    with driver(rude, tmp_path) as hub:
        prefix = "the site refuses: " if kind == "refused" else ""
        assert hub.round()[2].failure == prefix + shown
        assert hub.clients.describe() == {}
        assert all(line.isprintable() for line in hub.said)


@pytest.mark.parametrize("value", ["\ud800", "\x1b[2J", None, 7, True, [1], {"a": [1]}])
@pytest.mark.parametrize("name", ["kind", "site", "ticket", "run"])
def test_a_field_of_any_type_in_an_answer_leaves_out_that_site_alone(
    name: str, value: Any, tmp_path: Path
) -> None:
    def odd(site: str, request: bytes) -> bytes:
        return answer(request, **({name: value} if site == "south" else {}))

    with driver(odd, tmp_path) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], b"", LEARNED[2]]
        assert answers[1].failure.startswith("its answer is refused: ") and answers[1].failure.isprintable()
        assert all(line.isprintable() for line in hub.said)


@pytest.mark.parametrize("levels", [9, 500, 100_000])
def test_an_answer_whose_header_nests_too_deep_leaves_out_that_site_alone(
    levels: int, tmp_path: Path
) -> None:
    def deep(site: str, request: bytes) -> bytes:
        honest = answer(request, deep="here")
        if site != "south":
            return honest
        before, body = Envelope.from_bytes(honest).pieces()
        text = bytes(before[24:]).replace(b'"here"', b"[" * levels + b"]" * levels)
        return struct.pack("<8sQQ", b"flamelet", len(text), len(body)) + text + bytes(body)

    with driver(deep, tmp_path) as hub:
        assert updates(hub.round()) == [LEARNED[0], b"", LEARNED[2]]
        assert hub.heard("refused: an answer of south: a header")


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


def test_an_answer_that_is_longer_than_any_is_neither_read_nor_written_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.encoded_update_limit", lambda plan: 1000)
    monkeypatch.setattr("fedflame.engines.clients.ANSWER_MEMORY", 0)
    most, largest = LONGEST_BEFORE_BODY + 1000, list[int]()
    received = EngineJobs.event

    def noted(self: EngineJobs, timeout: float) -> Envelope | None:
        event = received(self, timeout)
        largest.append(len(event.body) if event else 0)
        return event

    def huge(site: str, request: bytes) -> bytes:
        honest = answer(request)
        return honest if site != "south" else honest + bytes(most + 1 - len(honest))

    monkeypatch.setattr(EngineJobs, "event", noted)
    with driver(huge, tmp_path) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], b"", LEARNED[2]]
        assert answers[1].failure == (
            f"its answer is refused: {most + 1:,} bytes; an answer to this request has at most {most:,}"
        )
        assert len(hub.engine.jobs) == 1 and max(largest) < 1000
        hub.engine.deliver = lambda site, request: described(request) + bytes(LONGEST_BEFORE_BODY)
        assert hub.clients.describe() == {} and max(largest) < 1000


def test_the_limit_of_an_answer_is_that_of_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.engines.clients.encoded_update_limit", encoded_update_limit)
    plan = a_plan(LARGE)

    def just_or_too_long(site: str, request: bytes) -> bytes:
        before, _ = Envelope.from_bytes(answer(request)).pieces()
        body = bytes(LONGEST_BEFORE_BODY - len(before) + update_limit(plan) + (site == "south"))
        text = bytes(before[24:])
        return struct.pack("<8sQQ", b"flamelet", len(text), len(body)) + text + body

    with driver(just_or_too_long, tmp_path) as hub:
        plans = [(client, encode_plan(plan)) for client in range(3)]
        assert [got.failure != "" for got in hub.clients.train(plans, hub.tokens.append)] == [0, 1, 0]


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


def test_what_a_site_holds_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.engines.clients.encode_addition", encode_addition)
    first, second = encode_plan(a_plan(LARGE)), encode_plan(replace(a_plan(LARGE), round=4))
    got: list[Envelope] = []

    def note(site: str, request: bytes) -> bytes:
        got.append(Envelope.from_bytes(request))
        return answer(request)

    with driver(note, tmp_path) as hub:
        (whole,) = hub.clients.train([(1, first)], hub.tokens.append)
        (added,) = hub.clients.train([(1, second)], hub.tokens.append)
        (other,) = hub.clients.train([(2, second)], hub.tokens.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["south.held", "west.held"]
    assert got[0].body == first and got[2].body == second
    assert decode_addition(bytes(got[1].body), first) == second
    assert whole.bytes_down == len(got[0].to_bytes()) and other.bytes_down == len(got[2].to_bytes())
    assert added.bytes_down == len(got[1].to_bytes()) < len(second) / 5


def test_a_site_that_lost_what_it_held_is_sent_the_whole_plan_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.encode_addition", encode_addition)
    first, second = encode_plan(a_plan(LARGE)), encode_plan(replace(a_plan(LARGE), round=4))
    sizes: list[int] = []

    def forgetful(site: str, request: bytes) -> bytes:
        sizes.append(len(request))
        lacking = Envelope.from_bytes(request).header["addition"]
        return answer(request, kind="lacking", reason="the disk was new") if lacking else answer(request)

    with driver(forgetful, tmp_path) as hub:
        list(hub.clients.train([(1, first)], hub.tokens.append))
        (got,) = hub.clients.train([(1, second)], hub.tokens.append)
        assert got.update == b"learned from " + second and got.bytes_down == sum(sizes[1:])
        assert hub.heard("south: the disk was new; it is sent the whole plan")
        sizes.clear()
        hub.engine.deliver = lambda site, request: answer(request, kind="lacking", reason="again")
        (never,) = hub.clients.train([(0, first)], hub.tokens.append)
    assert "of kind 'lacking'" in never.failure, "of a whole plan nothing can be lacking"


def test_after_a_resumption_a_site_that_trained_the_round_is_not_sent_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.encode_addition", encode_addition)
    plan = encode_plan(a_plan(LARGE))
    bodies: list[bytes] = []

    def has_it(site: str, request: bytes) -> bytes:
        if Envelope.from_bytes(request).header["kind"] == "describe":
            held = plan_digest(plan) if site == "south" else ""
            return described(request, held=held)
        bodies.append(bytes(Envelope.from_bytes(request).body))
        return answer(request)

    with driver(has_it, tmp_path) as hub:
        hub.clients.describe()
        list(hub.clients.train([(1, plan)], hub.tokens.append))
        list(hub.clients.train([(2, plan)], hub.tokens.append))
        waits = [hub.clients._patience["train"].wait(site, 1.0) for site in ("south", "west")]
        assert waits == [None, 600], "an answer without training says nothing of the next"
    assert decode_addition(bodies[0], plan) == bodies[1] == plan
    assert len(bodies[0]) < len(plan) / 5


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


def test_a_plan_that_a_site_refused_is_not_taken_for_one_that_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.encode_addition", encode_addition)
    first, second = encode_plan(a_plan(LARGE)), encode_plan(replace(a_plan(LARGE), round=4))
    bodies: list[bytes] = []

    def refuse_once(site: str, request: bytes) -> bytes:
        bodies.append(bytes(Envelope.from_bytes(request).body))
        return answer(request, kind="update" if len(bodies) > 1 else "refused", reason="not now")

    with driver(refuse_once, tmp_path) as hub:
        for plan in (first, second):
            list(hub.clients.train([(1, plan)], hub.tokens.append))
    assert bodies == [first, second]
    assert [path.name for path in tmp_path.iterdir()] == ["south.held"]


def test_what_sites_say_of_themselves_is_known_and_who_says_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.ANSWER_MEMORY", 0)

    def shy_south(site: str, request: bytes) -> bytes:
        if site == "south":
            return answer(request, kind="failed", reason="ValueError: x")
        return described(request, num_examples=len(site))

    with driver(shy_south, tmp_path) as hub:
        assert hub.clients.num_examples() == [0, 0, 0], "before they are asked"
        assert set(hub.clients.describe()) == {"north", "west"}
        assert hub.clients.num_examples() == [5, 0, 4]
        assert [line for line in hub.said if not line.startswith("job")] == ["south: ValueError: x"]
    assert list(tmp_path.iterdir()) == []


def test_the_rows_of_a_site_are_believed_up_to_ten_times_the_median_also_where_it_has_not_said_them(
    tmp_path: Path,
) -> None:
    claims = {"north": 5, "south": 10**9, "west": 40}
    with driver(lambda site, request: described(request, num_examples=claims[site]), tmp_path) as hub:
        hub.clients.describe()
        assert [hub.clients.believed_rows(client) for client in range(3)] == [5, 400, 40]
        del hub.clients._known["north"]
        assert [hub.clients.believed_rows(client) for client in range(3)] == [400, 400, 40]


NO_NUMBERS = ("7", None, 7.0, True, [7], {"rows": 7}, 0, -7, 2**63, float("inf"), float("nan"))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in list(DESCRIPTION)[1:4] for value in NO_NUMBERS]
    + [("held", value) for value in (7, None, True, ["held"])]
    + [("test_rows", value) for value in (-1, 2**31, True, "7", None, 1.0)],
)
def test_a_site_that_describes_itself_in_nonsense_is_one_that_says_nothing(
    name: str, value: Any, tmp_path: Path
) -> None:
    def odd_south(site: str, request: bytes) -> bytes:
        return described(request, **({name: value} if site == "south" else {}))

    with driver(odd_south, tmp_path) as hub:
        assert set(hub.clients.describe()) == {"north", "west"}
        assert hub.clients.num_examples() == [7, 0, 7]
        assert hub.heard(f"south: its answer is refused: description.{name} = {value!r}: Input should be")


@pytest.mark.parametrize("name", list(DESCRIPTION)[1:])
def test_a_site_that_leaves_out_a_part_of_its_description_is_one_that_says_nothing(
    name: str, tmp_path: Path
) -> None:
    def silent_south(site: str, request: bytes) -> bytes:
        said = Envelope.from_bytes(described(request)).header
        return Envelope({key: said[key] for key in said if site != "south" or key != name}).to_bytes()

    with driver(silent_south, tmp_path) as hub:
        assert set(hub.clients.describe()) == {"north", "west"}
        assert hub.heard(f"south: its answer is refused: description.{name} is missing")


def test_an_update_is_no_description_and_a_description_no_update(tmp_path: Path) -> None:
    with driver(honest, tmp_path) as hub:
        assert hub.clients.describe() == {}
        assert hub.heard("south: its answer is refused: it is of kind 'update'")
        hub.engine.deliver = lambda site, request: described(request)
        assert {got.failure for got in hub.round()} == {"its answer is refused: it is of kind 'description'"}


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
