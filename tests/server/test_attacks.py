"""Attacks of one client in three on a whole run: what is refused, and how far the rest can move the state."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.altered_answers import Change, falsify, huge, times
from tests.tiny_runs import events, tiny_run

from fedflame.config.methods import NAMED_METHODS
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.server.clipping import FACTOR, taken
from fedflame.training.reach import longest_way, trained_reach

pytestmark = pytest.mark.slow

HOSTILE = 1
"""The client with k = 2 of K = 4, whose rescaler is learned."""


def attack(monkeypatch: pytest.MonkeyPatch, change: Change) -> list[tuple[ClientUpdate, RoundPlan]]:
    """Change what the hostile client answers; return the list of what it sent."""
    sent: list[tuple[ClientUpdate, RoundPlan]] = []

    def hostile(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        if plan.client != HOSTILE:
            return update
        sent.append((change(update, plan), plan))
        return sent[-1][0]

    falsify(monkeypatch, hostile)
    return sent


def rescaler(s: float) -> Change:
    def falsify(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        return replace(update, rescaler_values=torch.full_like(update.rescaler_values, s))

    return falsify


def many_rows(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    return replace(update, num_examples=2**40)


REFUSED: dict[str, tuple[Change, str]] = {
    "delta x 1e6": (times(1e6), "an honest client moves one by at most"),
    "delta near 3e38": (huge, "moves a value by 3e+38"),
    "sign-flip x 10": (times(-10.0), "an honest client moves one by at most"),
    "rescaler 1e6": (rescaler(1e6), "moves a rescaler by 1e+06"),
    "rescaler -1": (rescaler(-1.0), "moves a rescaler by 2"),
    "2^40 rows": (many_rows, "update claims 1099511627776 rows"),
    "NaN": (times(math.nan), "is not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_honest_client_can_send_is_left_out_in_every_round_from_the_first(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    falsify, reason = REFUSED[name]
    attack(monkeypatch, falsify)
    settings = ("strategy.clip=none", "strategy.k_rotation=none", "evaluation.evaluate_every=0")
    tiny_run(tiny_folder, tmp_path / "run", *settings, "server.num_server_rounds=2")
    excluded = events(tmp_path / "run", "excluded")
    assert [(event["round"], event["client"]) for event in excluded] == [(n, HOSTILE) for n in (1, 2)]
    assert all(reason in event["reason"] for event in excluded), excluded[0]["reason"]
    assert {event["client"] for event in events(tmp_path / "run", "client")} == {0, 2}


def to_the_edge(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    furthest = 0.99 * trained_reach(plan)
    delta = update.delta.combine(update.delta, lambda value, _: -furthest * value.sign())
    if plan.rescaler != "learned":
        return replace(update, delta=delta)
    s = plan.rescaler_values - 0.99 * longest_way(plan)
    return replace(update, delta=delta, rescaler_values=s)


@pytest.mark.parametrize("method", NAMED_METHODS)
def test_within_the_bound_of_adamw_an_update_counts_for_no_more_than_the_factor(
    method: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight steps, after which honest values are well within the bound."""
    sent = attack(monkeypatch, to_the_edge)
    run = tmp_path / "run"
    settings = ("training.max_steps=8", "server.num_server_rounds=2", "evaluation.evaluate_every=0")
    tiny_run(tiny_folder, run, f"strategy.name={method}", *settings)
    assert not events(run, "excluded"), "it is within the bound"
    paces = {(e["round"], e["client"]): e["pace"] for e in events(run, "client")}
    shares = {(e["round"], e["client"]): e["share"] for e in events(run, "clipped")}
    first = sorted(pace for (number, _), pace in paces.items() if number == 1)
    assert paces[1, HOSTILE] == first[-1] == taken(*sent[0]).pace.delta
    assert shares[1, HOSTILE] <= FACTOR * first[1] / first[-1] * (1 + 1e-9)
    assert shares[2, HOSTILE] < 1
