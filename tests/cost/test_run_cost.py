"""What a run's configuration makes of the costs per token: by hand, and against `budgets`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost.shipped_configs import OLMOE, QKVO

from fedflame.config.load import load_config
from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.memory import training_memory
from fedflame.cost.model_shape import ModelShape, read_model_shape
from fedflame.cost.run_cost import RunCost, local_steps, run_cost, steps_of_epochs

LENGTH, SHARE = 100, 0.25
SETTINGS = ("clients.num_clients=5", "clients.active_experts=8,1", "training.max_steps=40")
"""Clients with k = 8, 1, 8, 1, 8."""
ROWS = (17, 8, 80, 5, 16)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return read_model_shape(OLMOE)


def cost_of(shape: ModelShape, *overrides: str) -> RunCost:
    return run_cost(load_config(None, [*SETTINGS, *overrides]), shape, "bfloat16", LENGTH, SHARE, ROWS)


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


@pytest.mark.parametrize(
    ("overrides", "tokens", "masked"),
    [
        (("training.packing=true",), 8 * 1024, 1024),
        (("training.packing=true", "data.max_length=300"), 8 * 300, 300),
        (("training.packing=true", "training.tokens_per_step=2048"), 2048, 1024),
        (("training.packing=true", "training.tokens_per_step=512"), 1024, 1024),  # one sequence at least
        (("training.padding_free=true",), 800, 800),
        (("training.packing=true", "training.padding_free=true"), 8 * 1024, 8 * 1024),
    ],
)
def test_packed_rows_fill_the_step_and_have_a_mask(
    shape: ModelShape, overrides: tuple[str, ...], tokens: int, masked: int
) -> None:
    cost = cost_of(shape, *overrides)
    for tier, memory in zip(cost.tiers, cost.memory, strict=True):
        k = tier.active_experts
        assert memory == training_memory(shape, k, 8, QKVO, tokens, "bfloat16", SHARE, mask_width=masked)
    assert {client.tokens_per_step for client in cost.clients} == {tokens}
    assert cost.tiers == cost_of(shape).tiers, "FLOPs are those of rows"


# Steps under a budget


def steps_of(budget: str, afforded: float, spent: float, max_steps: int = 10, method: str = "flame") -> int:
    settings = [f"training.budget={budget}", f"training.max_steps={max_steps}", f"strategy.name={method}"]
    return local_steps(load_config(None, settings), 3, afforded, spent)


@pytest.mark.parametrize(
    ("budget", "method", "afforded", "spent", "steps"),
    [
        ("steps", "flame", 8.0, 1.0, 10),
        ("steps", "flame", 4.0, 8.0, 5),  # a turn at a larger k
        ("steps", "fedavg", 4.0, 8.0, 10),  # whatever they cost
        ("compute", "fedavg", 5.0, 5.0, 10),
        ("compute", "flame", 8.0, 1.0, 80),
        ("compute", "fedavg", 1.0, 8.0, 1),  # 1.25
        ("compute", "flame", 2.0, 3.0, 7),  # 6.67
        ("compute", "fedavg", 1.0, 100.0, 1),  # not none
    ],
)
def test_steps_by_hand(budget: str, method: str, afforded: float, spent: float, steps: int) -> None:
    assert steps_of(budget, afforded, spent, method=method) == steps


def test_epochs_are_as_many_steps_as_a_client_has_batches(shape: ModelShape) -> None:
    """Of eight rows, or of as many rows of 100 tokens as fit."""
    epochs = ("training.num_train_epochs=1.5", "strategy.k_rotation=none")
    assert [one.steps for one in cost_of(shape, *epochs).clients] == [5, 2, 15, 2, 3]
    cost = cost_of(shape, *epochs, "training.gradient_accumulation_steps=4")
    assert [one.steps for one in cost.clients] == [2, 1, 4, 1, 1]
    by_tokens = cost_of(shape, *epochs, "training.tokens_per_step=300,64")
    assert [one.steps for one in by_tokens.clients] == [9, 12, 41, 8, 9]
    per_token = training_flops_per_token(shape, 8, 8, QKVO, LENGTH, SHARE).total
    assert cost.clients[0].training_flops == 2 * 4 * 800 * per_token


def test_under_a_compute_budget_epochs_grow_as_steps_do(shape: ModelShape) -> None:
    settings = ("training.num_train_epochs=1", "training.budget=compute", "strategy.k_rotation=smaller")
    of_the_first = [one for one in cost_of(shape, *settings).clients if one.client == 0]
    per_token = {k: training_flops_per_token(shape, k, 8, QKVO, LENGTH, SHARE).total for k in (8, 1)}
    assert {one.trained_experts: one.steps for one in of_the_first} == {
        8: 3, 1: math.ceil(3 * per_token[8] / per_token[1]),
    }  # fmt: skip


def test_no_number_of_epochs_is_without_a_step_or_without_end() -> None:
    assert steps_of_epochs(0.001, 3, 65_536) == 1
    assert steps_of_epochs(1000, 10**12, 1) == 1_000_000


costs_per_token = st.floats(1e5, 1e10)


@given(st.integers(1, 10**5), costs_per_token, costs_per_token)
def test_a_compute_budget_is_met_within_one_step(max_steps: int, afforded: float, spent: float) -> None:
    steps = steps_of("compute", afforded, spent, max_steps)
    assert abs(steps * spent - max_steps * afforded) < spent


OWN_K = "strategy.k_rotation=none"


def test_flame_takes_the_same_steps_under_either_budget_where_clients_train_at_their_own_k(
    shape: ModelShape,
) -> None:
    assert cost_of(shape, OWN_K) == cost_of(shape, OWN_K, "training.budget=compute")
    assert [client.steps for client in cost_of(shape, OWN_K).clients] == [40] * 5


def test_a_client_that_takes_turns_has_costs_at_each_k_and_more_steps_at_a_smaller_one(
    shape: ModelShape,
) -> None:
    cost = cost_of(shape, "training.budget=compute", "strategy.k_rotation=smaller")
    assert [(one.client, one.trained_experts) for one in cost.clients] == [
        (0, 8), (0, 1), (1, 1), (2, 8), (2, 1), (3, 1), (4, 8), (4, 1),
    ]  # fmt: skip
    assert [(tier.active_experts, tier.clients) for tier in cost.tiers] == [(8, 3), (1, 5)]
    per_token = {k: training_flops_per_token(shape, k, 8, QKVO, LENGTH, SHARE).total for k in (8, 1)}
    for one in cost.clients:
        affords = 8 if one.client % 2 == 0 else 1
        assert one.steps == round(40 * per_token[affords] / per_token[one.trained_experts])
    middle = cost_of(shape, "clients.active_experts=8,2,1", "server.num_server_rounds=6").clients
    assert {one.trained_experts for one in middle if one.client == 1} == {2, 1}
    middle = cost_of(
        shape, "clients.active_experts=8,2,1", "server.num_server_rounds=6", "strategy.k_rotation=all"
    ).clients
    cost_at = {k: training_flops_per_token(shape, k, 8, QKVO, LENGTH, SHARE).total for k in (8, 2)}
    assert [(one.trained_experts, one.steps) for one in middle if one.client == 1] == [
        (8, round(40 * cost_at[2] / cost_at[8])), (2, 40), (1, 40),
    ]  # fmt: skip
    one_round = cost_of(shape, "strategy.k_rotation=smaller", "server.num_server_rounds=1")
    assert [(one.client, one.trained_experts) for one in one_round.clients] == [
        (0, 8), (1, 1), (2, 1), (3, 1), (4, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", ["", "512,4096"])
@pytest.mark.parametrize(("trained", "k"), [("min", 1), ("8", 8), ("3", 3)])
def test_a_compute_budget_is_what_flame_spends_within_a_step(
    shape: ModelShape, trained: str, k: int, tokens: str
) -> None:
    steps = f"training.tokens_per_step={tokens}"
    method = ("strategy.name=fedavg", f"strategy.active_experts={trained}", "training.budget=compute")
    flame, fedavg = cost_of(shape, steps, OWN_K).clients, cost_of(shape, steps, *method).clients
    per_token = training_flops_per_token(shape, k, 8, QKVO, LENGTH, SHARE).total
    for affords, one, other in zip((8, 1, 8, 1, 8), flame, fedavg, strict=True):
        assert (one.trained_experts, other.trained_experts) == (affords, k)
        assert one.tokens_per_step == other.tokens_per_step
        assert other.training_flops == other.steps * other.tokens_per_step * per_token
        assert abs(other.training_flops - one.training_flops) < per_token * other.tokens_per_step
        assert (other.steps > 40, other.steps < 40) == (affords > k, affords < k)


def test_a_private_run_takes_the_memory_of_what_it_computes_at_once(shape: ModelShape) -> None:
    rows = "training.per_device_train_batch_size=512"
    settings = ((rows,), (rows, "privacy.unit=row"), (rows, "privacy.unit=row", "privacy.clipping=ghost"))
    whole, one, ghost = (cost_of(shape, *more).memory[0].activations for more in settings)
    assert whole == pytest.approx(512 * one) and ghost == pytest.approx(20.48 * one)


# Evaluations at the clients


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        (("server.fraction_evaluate=1",), (8, 8, 8, 8, 8)),
        (("server.fraction_evaluate=0.4", "strategy.name=fedavg", "strategy.rank=2"), (8, 8)),
        (("server.fraction_evaluate=0.6", "strategy.name=hetlora", "clients.ranks=2,5,3,8,1"), (8, 5, 3)),
        ((), ()),
    ],
)
def test_an_evaluation_sends_the_ranks_that_are_deployed_and_gets_sums(
    shape: ModelShape, overrides: tuple[str, ...], ranks: tuple[int, ...]
) -> None:
    """Of those that are asked, the clients with the most ranks; before training, after rounds 2, 4 and 5."""
    rounds = ("server.num_server_rounds=5", "evaluation.evaluate_every=2")
    scoring = cost_of(shape, *rounds, *overrides).scoring
    values = 16 * 64 * 3 * (2048 + 1024) + 16 * 4 * (2048 + 2048)  # of one rank: experts and attention
    assert scoring.bytes_down == sum(4 * (rank * values + 16) for rank in ranks)
    assert (scoring.clients, scoring.evaluations) == (len(ranks), 4 if ranks else 0)
    assert scoring.bytes_up == 500 * len(ranks)
