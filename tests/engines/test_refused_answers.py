"""Answers that are none, or not to what was asked: that site is left out, with a line that says why."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engines.driver_here import LARGE, LEARNED, answer, described, driver, honest, updates
from tests.engines_here import ThreadEngine
from tests.message_samples import a_plan

from fedflame.engines.jobs import EngineJobs
from fedflame.engines.link import HubLink
from fedflame.wire.codec import encode_plan, encoded_update_limit, update_limit
from fedflame.wire.envelope import LONGEST_BEFORE_BODY, Envelope

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient", "whole")]


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
