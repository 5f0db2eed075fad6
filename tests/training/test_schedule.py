"""The learning rate of each step: against transformers' schedulers, and by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.message_samples import a_plan
from transformers import get_scheduler

from fedflame.config.load import load_config
from fedflame.server.plans import round_learning_rate
from fedflame.training.schedule import learning_rates

PLAN = replace(a_plan(), round=1, learning_rate=0.02, lr_scheduler_type="constant", warmup_rounds=0.0)


def of_transformers(name: str, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.02)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=steps)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_names_mean_within_a_round_what_they_mean_in_transformers(name: str, steps: int) -> None:
    plan = replace(PLAN, lr_scheduler_type=name)
    assert list(learning_rates(plan, steps)) == pytest.approx(of_transformers(name, steps), rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_over_the_rounds_they_are_those_of_transformers_over_as_many_steps(name: str) -> None:
    config = load_config(
        None,
        [f"training.lr_scheduler_type={name}", "training.learning_rate=0.02", "server.num_server_rounds=5"],
    )
    rates = [round_learning_rate(config, number) for number in range(1, 6)]
    assert rates == pytest.approx(of_transformers(name, 5), rel=1e-12)


def test_a_warm_up_goes_on_over_the_rounds_from_step_to_step() -> None:
    """One and a half rounds of four steps: six steps of rising rates, then the whole rate."""
    plan = replace(PLAN, warmup_rounds=1.5)
    first, second, third = (list(learning_rates(replace(plan, round=number), 4)) for number in (1, 2, 3))
    assert first == pytest.approx([0.02 * step / 6 for step in (1, 2, 3, 4)])
    assert second == pytest.approx([0.02 * 5 / 6, 0.02, 0.02, 0.02])
    assert third == [0.02] * 4


def test_after_the_warm_up_the_rest_of_the_rounds_is_the_whole_schedule() -> None:
    settings = [
        "training.lr_scheduler_type=linear",
        "training.learning_rate=0.02",
        "server.num_server_rounds=6",
    ]
    config = load_config(None, [*settings, "training.max_steps=10", "training.warmup_steps=20"])
    assert config.warmup_rounds() == 2
    rates = [round_learning_rate(config, number) for number in range(1, 7)]
    assert rates == pytest.approx([0.02, 0.02, 0.02, 0.015, 0.01, 0.005])
    as_ratio = load_config(None, [*settings, f"training.warmup_ratio={1 / 3}"])
    assert [round_learning_rate(as_ratio, number) for number in range(1, 7)] == pytest.approx(rates)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 9),
    st.floats(0, 20),
    st.integers(1, 60),
)
def test_more_steps_go_further_and_none_is_above_the_rounds_rate(
    name: str, round_number: int, warmup: float, steps: int
) -> None:
    """The bound of an update is computed for the most steps; fewer must not need more."""
    plan = replace(PLAN, round=round_number, lr_scheduler_type=name, warmup_rounds=warmup)
    rates, more = list(learning_rates(plan, steps)), list(learning_rates(plan, steps + 1))
    assert all(0 < rate <= plan.learning_rate * (1 + 1e-12) for rate in rates)
    assert sum(rates) <= sum(more) * (1 + 1e-9)
    if not warmup:
        assert all(one >= other for one, other in pairwise(rates))
