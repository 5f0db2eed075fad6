"""Clients of one process that give no answer, or another one than their training comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.wire.codec import decode_plan, decode_update, encode_update

Which = tuple[int, int]
"""Round and client."""
Change = Callable[[ClientUpdate, RoundPlan], ClientUpdate]


def skip(monkeypatch: pytest.MonkeyPatch, skipped: Iterable[Which]) -> None:
    """Clients give no answer for these rounds."""
    known, answer = frozenset(skipped), LocalClients.answer

    def told_to_skip(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        asked = decode_plan(plan)
        skips = (asked.round, asked.client) in known
        return Answer(b"", "told to skip", 0.0) if skips else answer(self, plan, on_step)

    monkeypatch.setattr(LocalClients, "answer", told_to_skip)


def interrupt(monkeypatch: pytest.MonkeyPatch, at: Which) -> None:
    """The run is interrupted when it comes to this client in this round."""
    answer = LocalClients.answer

    def interrupted(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        asked = decode_plan(plan)
        if (asked.round, asked.client) == at:
            raise KeyboardInterrupt
        return answer(self, plan, on_step)

    monkeypatch.setattr(LocalClients, "answer", interrupted)


def falsify(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Change what clients answer; an update that stays the same object is sent as it came."""
    answer = LocalClients.answer

    def falsified(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        asked, honest = decode_plan(plan), answer(self, plan, on_step)
        trained = decode_update(honest.update, asked)
        update = change(trained, asked)
        return honest if update is trained else replace(honest, update=encode_update(update, asked))

    monkeypatch.setattr(LocalClients, "answer", falsified)


def times(factor: float) -> Change:
    def change(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        return replace(update, delta=update.delta.combine(update.delta, lambda value, _: factor * value))

    return change


def huge(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """Finite values whose sum is not."""
    return replace(update, delta=update.delta.combine(update.delta, lambda value, _: 3e38 * value.sign()))
