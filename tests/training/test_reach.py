"""How far AdamW can move a value: by gradients that try, and that no honest client is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.random_rounds import LAYERS, K, an_adapter, an_update
from torch import Tensor, nn

from fedflame.errors import InvalidMessage
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.moe.masked_adamw import BETAS, Moments, masked_adamw
from fedflame.training.error_feedback import Residuals, encode_with_feedback
from fedflame.training.reach import (
    largest_value,
    longest_step,
    longest_way,
    require_within_reach,
    sent_reach,
    trained_reach,
)
from fedflame.wire.codec import decode_update

pushes_of_any_size = st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-30.0, 18.0)).map(
    lambda drawn: drawn[0] * 10.0 ** drawn[1]
)
gradients = st.lists(pushes_of_any_size, min_size=1, max_size=60)


def a_plan(adapter: Adapter | None = None, **values: object) -> RoundPlan:
    plan = RoundPlan(
        round=1,
        client=0,
        seed=0,
        active_experts=2,
        rescaler="learned",
        rescaler_values=torch.ones(LAYERS),
        adapter=adapter or an_adapter(torch.Generator().manual_seed(0)),
        learning_rate=0.01,
        weight_decay=0.0,
        batch_size=4,
        max_steps=5,
    )
    return replace(plan, **values)  # type: ignore[arg-type]


def moved_by(pushes: list[float], plan: RoundPlan) -> float:
    """How far our optimizer moves a value that begins at the largest of the plan's, by these gradients."""
    start = torch.full((1, 1), largest_value(plan.adapter))
    bank, moments, all_of_it = start.clone(), Moments.of(start), torch.ones(1, dtype=torch.bool)
    for push in pushes:
        gradient = torch.full_like(bank, push)
        masked_adamw(bank, moments, gradient, all_of_it, plan.learning_rate, plan.weight_decay)
    return float((bank - start).abs())


# AdamW


@pytest.mark.parametrize("step", [1, 2, 3, 10, 80, 1000])
def test_there_are_gradients_that_reach_the_longest_step_in_float64(step: int) -> None:
    value = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    adamw = torch.optim.AdamW([value], lr=1.0, weight_decay=0.0, betas=BETAS, eps=0.0)
    before = 0.0
    for taken in range(1, step + 1):
        before = float(value.detach())
        value.grad = torch.full_like(value, (BETAS[0] / BETAS[1]) ** (step - taken) * 1e3)
        adamw.step()
    assert float(value.detach()) - before == pytest.approx(-longest_step(step), rel=1e-6)


def test_a_way_is_the_sum_of_its_steps() -> None:
    assert longest_step(1) == pytest.approx(1.0, rel=1e-12)
    total = 0.0
    for step in range(1, 81):
        total += longest_step(step)
    way = longest_way(a_plan(learning_rate=1.0, max_steps=80))
    assert way == pytest.approx(total, rel=1e-12)
    assert 80 < way < 3.17 * 80
    falling = a_plan(learning_rate=1.0, max_steps=3, lr_scheduler_type="linear")
    by_hand = longest_step(1) + 2 / 3 * longest_step(2) + 1 / 3 * longest_step(3)
    assert longest_way(falling) == pytest.approx(by_hand, rel=1e-12)
    limit = (1 - BETAS[0]) / math.sqrt((1 - BETAS[1]) * (1 - BETAS[0] ** 2 / BETAS[1]))
    assert longest_step(20_000) == pytest.approx(limit, rel=1e-6) and limit < 7.28


@given(gradients, st.floats(1e-7, 1.0), st.sampled_from([0.0, 0.1, 1.0, 3.0]))
def test_no_gradients_move_a_value_further(pushes: list[float], rate: float, decay: float) -> None:
    plan = a_plan(learning_rate=rate, weight_decay=decay, max_steps=len(pushes))
    assert moved_by(pushes, plan) <= trained_reach(plan)


@given(st.floats(0.0, 1.0), st.integers(1, 60), st.sampled_from([-1.0, 1.0]))
def test_gradients_that_grow_towards_the_end_stay_within(decay: float, steps: int, sign: float) -> None:
    plan = a_plan(weight_decay=decay, max_steps=steps)
    pushes = [sign * (BETAS[0] / BETAS[1]) ** (steps - taken) for taken in range(1, steps + 1)]
    assert moved_by(pushes, plan) <= trained_reach(plan)


def test_decay_that_changes_signs_stays_within() -> None:
    plan = a_plan(learning_rate=0.5, weight_decay=5.0, max_steps=7)
    assert moved_by([0.0] * 7, plan) <= trained_reach(plan)


# Rounding and error feedback


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_rounding_leaves_never_adds_up_to_more(dtype: str, tmp_path: object) -> None:
    """A client that always goes as far as it can, with the rounding errors of all rounds fed back."""
    residuals = Residuals(tmp_path)  # type: ignore[arg-type]
    generator, earlier, furthest = torch.Generator().manual_seed(1), 0.0, 0.0
    for number in range(1, 30):
        rate = 0.01 if number < 20 else 0.0005  # the residuals of fast rounds meet a slow one
        plan = a_plan(round=number, learning_rate=rate, update_dtype=dtype, error_feedback=True)
        reach = trained_reach(plan)
        update = at_the_edge(generator, reach)
        sent = decode_update(encode_with_feedback(replace(update, round=number), plan, residuals), plan)
        require_within_reach(sent, plan, earlier, K)
        furthest = max(furthest, largest_value(sent.delta) / reach)
        earlier = max(earlier, reach)
    assert furthest > 1.01


def at_the_edge(generator: torch.Generator, reach: float) -> ClientUpdate:
    """Every value as far as it can be, or close to it."""
    update = an_update(generator, 0)
    update = replace(update, counts=update.counts.clamp(min=1), rescaler_values=torch.ones(LAYERS))

    def drawn(value: Tensor) -> Tensor:
        far = torch.rand(value.shape, generator=generator) < 0.3
        sizes = torch.where(far, 1.0, 0.5 + 0.5 * torch.rand(value.shape, generator=generator))
        return value.sign() * sizes * reach

    return replace(update, delta=update.delta.combine(update.delta, lambda value, _: drawn(value)))


# The refusal


def test_an_update_is_refused_beyond_the_bound_and_used_at_it() -> None:
    plan = a_plan()
    most = sent_reach(plan, 0.0)
    for factor, refused in ((0.999, False), (1.001, True), (1e6, True)):
        update = replace(an_update(torch.Generator().manual_seed(2), 0), rescaler_values=torch.ones(LAYERS))
        update.delta.experts["1.A2"][3, 1, 2] = -factor * most
        if not refused:
            require_within_reach(within(update, most), plan, 0.0, K)
            continue
        with pytest.raises(
            InvalidMessage, match=r"moves a value by .*; an honest client moves one by at most"
        ):
            require_within_reach(update, plan, 0.0, K)


def within(update: ClientUpdate, most: float) -> ClientUpdate:
    clamped = update.delta.combine(update.delta, lambda value, _: value.clamp(-most, most))
    return replace(update, delta=clamped)


@pytest.mark.parametrize("s", [1e6, -1.0, 3e38])
def test_a_learned_rescaler_moves_no_further_either(s: float) -> None:
    plan = a_plan()
    update = within(an_update(torch.Generator().manual_seed(2), 0), 0.01)
    for at, refused in ((1.0 + 0.99 * longest_way(plan), False), (s, True)):
        changed = replace(update, rescaler_values=torch.tensor([1.0, at]))
        if not refused:
            require_within_reach(changed, plan, 0.0, K)
            continue
        with pytest.raises(InvalidMessage, match="moves a rescaler by"):
            require_within_reach(changed, plan, 0.0, K)


def test_a_measured_rescaler_lies_between_one_and_the_ratio_of_k_with_room() -> None:
    plan = a_plan(rescaler="mass")
    update = within(an_update(torch.Generator().manual_seed(2), 0), 0.01)
    for honest in (1.0, K / 2):
        require_within_reach(replace(update, rescaler_values=torch.full((LAYERS,), honest)), plan, 0.0, K)
    for other in (-1.0, 0.0, 2.01 * K / 2, 1e6):
        with pytest.raises(InvalidMessage, match="measured rescalers"):
            require_within_reach(replace(update, rescaler_values=torch.tensor([1.0, other])), plan, 0.0, K)
