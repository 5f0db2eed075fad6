"""Paces against plain loops in float64, and what clipping lets through."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.altered_answers import interrupt
from tests.random_rounds import LAYERS, an_adapter, updates_of
from tests.same_bits import assert_same_adapter
from tests.tiny_runs import adapter_bytes, events, state_bytes, tiny_run

from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients
from fedflame.config.words import Trainable
from fedflame.messages import Adapter, ClientUpdate, RoundPlan, half_of
from fedflame.server.clipping import (
    FACTOR,
    WINDOW,
    Limits,
    Pace,
    Taken,
    clipped,
    delta_norms,
    limits,
    outliers,
    remembered,
    scaled,
    taken,
)
from fedflame.strategies.base import Past
from fedflame.wire.codec import decode_plan, decode_update, encode_update

RATE, STEPS = 0.02, 5


def a_plan(update: ClientUpdate, learned: bool = True) -> RoundPlan:
    return RoundPlan(
        round=1,
        client=update.client,
        seed=0,
        active_experts=2,
        rescaler="learned" if learned else "fixed",
        rescaler_values=torch.ones(LAYERS),
        adapter=an_adapter(torch.Generator().manual_seed(0)),
        learning_rate=RATE,
        weight_decay=0.0,
        batch_size=4,
        max_steps=STEPS,
    )


def sent(update: ClientUpdate) -> ClientUpdate:
    """As it arrives: experts without a token have not moved."""
    experts = {
        name: torch.where((update.counts[int(name[0])] > 0).view(-1, 1, 1), value, 0.0)
        for name, value in update.delta.experts.items()
    }
    return replace(update, delta=replace(update.delta, experts=experts))


def a_round(seed: int, clients: int, trainable: Trainable = "both") -> list[Taken]:
    updates = updates_of(seed, [3] * clients, trainable)
    return [taken(sent(update), a_plan(update)) for update in updates]


def pace_by_loops(update: ClientUpdate) -> float:
    """Every value that could move, one by one, in Python's floats."""
    squares, count = 0.0, 0
    for name, value in update.delta.tensors().items():
        kind, rest = name.split(".", 1)
        if update.trainable not in ("both", half_of(name)):
            continue
        slices = enumerate(value) if kind == "experts" else [(-1, value)]
        for expert, part in slices:
            if kind == "experts" and not int(update.counts[int(rest[0]), expert]):
                continue
            for number in part.flatten().tolist():
                squares += number * number
                count += 1
    return math.sqrt(squares / count) / (RATE * math.sqrt(STEPS))


# Paces


@given(st.integers(0, 2**32), st.sampled_from(["both", "A", "B"]))
def test_a_pace_is_the_root_mean_square_of_what_could_move(seed: int, trainable: Trainable) -> None:
    for one in a_round(seed, 2, trainable):
        assert one.pace.delta == pytest.approx(pace_by_loops(one.update), rel=1e-9)
        step = [s - 1.0 for s in one.update.rescaler_values.tolist()]
        wanted = math.sqrt(sum(s * s for s in step) / len(step)) / (RATE * math.sqrt(STEPS))
        assert one.pace.rescaler == pytest.approx(wanted, rel=1e-6)


def test_at_a_rate_of_zero_nothing_moves_and_the_pace_is_zero() -> None:
    update = replace(updates_of(1, [3])[0], rescaler_values=torch.ones(LAYERS))
    still = replace(update, delta=update.delta.combine(update.delta, lambda value, _: 0.0 * value))
    assert taken(still, replace(a_plan(update), learning_rate=0.0)).pace == Pace(0.0, 0.0)


def test_norms_are_told_by_kind() -> None:
    (one,) = a_round(3, 1)
    assert list(one.norms) == ["A1", "B1", "A2", "B2", "attention", "rescaler"]
    values = one.update.delta.tensors()
    for kind in ("A1", "B2"):
        wanted = math.sqrt(
            sum(
                x * x
                for name, value in values.items()
                if name.endswith(kind)
                for x in value.flatten().tolist()
            )
        )
        assert one.norms[kind] == pytest.approx(wanted, rel=1e-9)
    wanted = math.hypot(*(x for name, v in values.items() if "q_proj" in name for x in v.flatten().tolist()))
    assert one.norms["attention"] == pytest.approx(wanted, rel=1e-9)


def test_a_rescaler_that_is_not_learned_has_no_pace() -> None:
    update = replace(updates_of(0, [3])[0], rescaler_values=torch.ones(LAYERS))
    assert taken(update, a_plan(update, learned=False)).pace.rescaler is None


# Limits


def test_the_limit_is_the_factor_times_the_lower_median() -> None:
    past = Past(paces=(4.0, 1.0, 2.0, 3.0), rescaler_paces=(0.5,))
    assert limits(past, "median") == Limits(FACTOR * 2.0, FACTOR * 0.5)
    assert limits(past, "0.25") == Limits(0.25, 0.25)
    assert limits(past, "none") == Limits()
    assert limits(Past(paces=(1.0,)), "median") == Limits(FACTOR, math.inf)


def test_paces_are_remembered_as_they_came_and_the_oldest_go() -> None:
    past = Past(0.3, tuple(map(float, range(WINDOW))), (1.0,))
    new = remembered(past, [Pace(100.0, None), Pace(200.0, 5.0)])
    assert new == Past(0.3, (*map(float, range(2, WINDOW)), 100.0, 200.0), (1.0, 5.0))


@given(st.integers(0, 2**32), st.floats(0.01, 3.0), st.floats(0.01, 3.0))
def test_nothing_goes_further_than_the_limits_and_what_is_within_keeps_its_bits(
    seed: int, delta: float, rescaler: float
) -> None:
    for one in a_round(seed, 3):
        usual = one.pace
        assert usual.rescaler is not None
        found = Limits(delta * usual.delta, rescaler * usual.rescaler)
        after = scaled(one, found)
        again = taken(after.update, a_plan(one.update)).pace
        assert again.delta == pytest.approx(min(found.delta, usual.delta), rel=1e-6)
        rounding = 2**-23 / (RATE * math.sqrt(STEPS))  # of s, which is about 1
        assert again.rescaler == pytest.approx(min(found.rescaler, usual.rescaler), rel=1e-6, abs=rounding)
        assert after.share == pytest.approx(min(1.0, delta, rescaler), rel=1e-9)
        if delta >= 1:
            assert_same_adapter(after.update.delta, one.update.delta)
        if rescaler >= 1:
            assert torch.equal(after.update.rescaler_values, one.update.rescaler_values)
        assert torch.equal(after.update.counts, one.update.counts)


@pytest.mark.parametrize("size", [10.0, 1e6, 1e30])
def test_one_that_went_far_goes_no_further_than_the_factor_in_the_first_round_and_later(
    size: float, tmp_path: Path
) -> None:
    honest = a_round(1, 4)
    far = far_of(honest[2], size)
    stream = [honest[0], honest[1], far, honest[3]]
    usual = sorted(one.pace.delta for one in stream)[1]
    for past in (Past(), Past(paces=(usual,) * 3)):
        after = list(clipped(iter(stream), past, "median", tmp_path))
        paces = [taken(one.update, a_plan(one.update)).pace.delta for one in after]
        assert paces[2] == pytest.approx(FACTOR * usual, rel=1e-6)
        for at in (0, 1, 3):
            assert_same_adapter(after[at].update.delta, stream[at].update.delta)


def far_of(one: Taken, size: float) -> Taken:
    delta = one.update.delta.combine(one.update.delta, lambda value, _: value * size)
    return taken(replace(one.update, delta=delta), a_plan(one.update))


@given(st.permutations(range(4)))
def test_the_order_of_clients_changes_no_limit(order: list[int]) -> None:
    paces = [Pace(1.0, 0.3), Pace(5.0, None), Pace(0.2, 0.1), Pace(0.9, 4.0)]
    wanted = limits(remembered(Past(), paces), "median")
    assert limits(remembered(Past(), [paces[at] for at in order]), "median") == wanted


def test_a_false_majority_does_not_hold_the_limit_down_for_ever() -> None:
    past = remembered(Past(), [Pace(1e-9, None)] * 3 + [Pace(1.0, None)])
    assert limits(past, "median").delta < 1e-8
    for _ in range(3):
        past = remembered(past, [Pace(1e-9, None)] + [Pace(1.0, None)] * 3)
    assert limits(past, "median").delta == FACTOR


# Streams


def test_in_the_first_round_updates_wait_and_in_later_rounds_one_is_there_at_a_time(tmp_path: Path) -> None:
    drawn: list[int] = []

    def stream() -> Iterator[Taken]:
        for number, one in enumerate(a_round(1, 3)):
            drawn.append(number)
            yield one

    for past, rule, first in ((Past(), "median", 3), (Past(paces=(1.0,)), "median", 1), (Past(), "2", 1)):
        drawn.clear()
        found = clipped(stream(), past, rule, tmp_path)
        next(found)
        assert len(drawn) == first
        assert not list(tmp_path.iterdir()), "the file has no name that a kill could leave"


def test_without_clipping_every_bit_and_every_order_of_names_stays(tmp_path: Path) -> None:
    stream = a_round(5, 3)
    for past, rule in ((Past(), "none"), (Past(), "median"), (Past(paces=(1e9,)), "median")):
        for before, after in zip(stream, clipped(iter(stream), past, rule, tmp_path), strict=True):
            assert list(after.update.delta.tensors()) == list(before.update.delta.tensors())
            if rule == "none" or past.paces:
                assert_same_adapter(after.update.delta, before.update.delta)


# Outliers


def test_an_outlier_has_over_three_times_the_median() -> None:
    assert outliers([Pace(1.0, None), Pace(3.0, None), Pace(3.1, None), Pace(1.0, None)]) == {2: 3.1}
    assert outliers([]) == {} and outliers([Pace(0.0, None), Pace(0.0, None), Pace(1.0, None)]) == {}


# Runs


@pytest.mark.slow
def test_clipping_is_on_by_default_and_said(
    undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    whole = undisturbed()
    tiny_run(tiny_folder, tmp_path / "median", "strategy.clip=median")
    assert adapter_bytes(whole) == adapter_bytes(tmp_path / "median")
    tight = "strategy.clip=0.3"
    tiny_run(tiny_folder, tmp_path / "tight", tight)
    assert adapter_bytes(tmp_path / "tight") != adapter_bytes(whole)
    assert {event["client"] for event in events(tmp_path / "tight", "clipped")} == {0, 1, 2}
    for event in events(tmp_path / "tight", "client"):
        assert set(event["norms"]) == {"A1", "B1", "A2", "B2", "attention", "rescaler"}
        assert event["pace"] > 0.3


@pytest.mark.slow
def test_a_run_that_goes_on_clips_by_the_same_paces(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.server.clipping.FACTOR", 0.9)  # so that most updates are clipped
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, (2, 0))
        tiny_run(tiny_folder, tmp_path / "ended")
    tiny_run(tiny_folder, tmp_path / "ended", existing="resume")
    tiny_run(tiny_folder, tmp_path / "whole")
    assert state_bytes(tmp_path / "ended") == state_bytes(tmp_path / "whole")
    assert {event["round"] for event in events(tmp_path / "whole", "clipped")} == {1, 2, 3}
    assert events(tmp_path / "ended", "clipped") == events(tmp_path / "whole", "clipped")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["median", "none"])
def test_an_outlier_is_warned_of_in_metrics_report_and_console(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.setattr("fedflame.server.updates.require_within_reach", lambda *_: None)
    answer = LocalClients.answer

    def far_in_round_two(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        told, honest = decode_plan(plan), answer(self, plan, on_step)
        if (told.client, told.round) != (1, 2):
            return honest
        update = decode_update(honest.update, told)
        delta = update.delta.combine(update.delta, lambda value, _: value * -10)
        return replace(honest, update=encode_update(replace(update, delta=delta), told))

    monkeypatch.setattr(LocalClients, "answer", far_in_round_two)
    shown = " ".join(tiny_run(tiny_folder, tmp_path / "run", f"strategy.clip={rule}").split())
    (outlier,) = events(tmp_path / "run", "outlier")
    assert (outlier["round"], outlier["client"]) == (2, 1) and 5 < outlier["times"] < 20
    assert "warning: round 2: client 1 went" in shown
    assert "Warning: Client 1 went" in (tmp_path / "run" / "report.html").read_text()
    clipped_then = [(event["round"], event["client"]) for event in events(tmp_path / "run", "clipped")]
    assert ((2, 1) in clipped_then) == (rule == "median")


@given(st.randoms(use_true_random=False))
def test_norms_do_not_depend_on_the_order_of_the_values(rng: random.Random) -> None:
    """A state that comes from a checkpoint names its values in another order than one that was just made."""
    generator = torch.Generator().manual_seed(3)
    names = [f"{layer}.{bank}" for layer in range(9) for bank in ("A1", "B1", "A2", "B2")]
    experts = {name: torch.randn(2, 3, 5, generator=generator) * 0.1 for name in names}
    attention = {f"q{at}.A": torch.randn(3, 7, generator=generator) for at in range(9)}
    shuffled = Adapter(*(dict(rng.sample(list(part.items()), len(part))) for part in (experts, attention)))
    assert delta_norms(shuffled) == delta_norms(Adapter(experts, attention))
    assert list(delta_norms(shuffled)) == ["A1", "B1", "A2", "B2", "attention"]
