"""Plans that sites hold: only what is new is sent, or the whole plan where a site has lost it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.engines.driver_here import LARGE, answer, described, driver
from tests.message_samples import a_plan

from fedflame.wire.addition import decode_addition, encode_addition, plan_digest
from fedflame.wire.codec import encode_plan
from fedflame.wire.envelope import Envelope

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient", "whole")]


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
