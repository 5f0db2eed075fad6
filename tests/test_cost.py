"""What a run's configuration makes of the costs per token: by hand, and against `budgets`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedflame.budgets import training_memory
from fedflame.config import load_config
from fedflame.cost import RunCost, run_cost
from fedflame.model_shape import ModelShape, read_model_shape

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
LENGTH, SHARE = 100, 0.25
SETTINGS = ("clients.num_clients=5", "clients.active_experts=8,1", "training.max_steps=40")
"""Clients with k = 8, 1, 8, 1, 8."""


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_model_shape(Path(__file__).parents[1] / "configs" / "models" / "OLMoE-1B-7B-0924")


def cost_of(shape: ModelShape, *overrides: str) -> RunCost:
    return run_cost(load_config(None, [*SETTINGS, *overrides]), shape, "bfloat16", LENGTH, SHARE)


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ((), {8: 800, 1: 800}),  # 8 rows
        (("training.per_device_train_batch_size=3",), {8: 300, 1: 300}),
        (("training.tokens_per_step=2048",), {8: 2048, 1: 2048}),
        (("training.tokens_per_step=512,4096",), {8: 512, 1: 4096}),
        (("training.tokens_per_step=256,1024,512,768",), {8: 512, 1: 1024}),  # the last client: 256 again
        (("training.tokens_per_step=64",), {8: 100, 1: 100}),  # one row at least
        (("training.tokens_per_step=512,4096", "strategy.name=fedavg"), {8: 512, 1: 4096}),  # all train at 1
    ],
)
def test_memory_is_that_of_the_largest_step_of_the_tier(
    shape: ModelShape, overrides: tuple[str, ...], tokens: dict[int, int]
) -> None:
    cost = cost_of(shape, *overrides)
    assert [tier.active_experts for tier in cost.tiers] == [8, 1]
    for tier, memory in zip(cost.tiers, cost.memory, strict=True):
        k = tier.active_experts
        assert memory == training_memory(shape, k, 8, QKVO, tokens[k], "bfloat16", SHARE)
