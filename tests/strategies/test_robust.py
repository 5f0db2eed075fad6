"""Robust means against plain loops in float64, what few clients can do, and which methods have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.random_rounds import LAYERS, K, an_adapter, updates_of
from tests.same_bits import assert_same_adapter
from tests.tiny_runs import adapter_bytes, state_bytes, tiny_run
from torch import Tensor

from fedflame.config.load import load_config
from fedflame.config.methods import METHODS, NAMED_METHODS
from fedflame.config.words import RobustRule
from fedflame.errors import UserError
from fedflame.experiment.method import build_strategy
from fedflame.messages import ClientUpdate
from fedflame.strategies.base import ServerState, Strategy, WeightedMean
from fedflame.strategies.robust import PASSES, SMOOTHING, GeometricMedian, TrimmedMean, mean_by

EXPERTS, ROWS, COLUMNS = 4, 3, 2
RULES: tuple[RobustRule, ...] = ("trimmed_mean", "geometric_median")
seeds = st.integers(0, 2**32)


def drawn(seed: int, clients: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    """Values [clients,E,rows,columns] and weights [clients,E], a third of which are zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(clients, EXPERTS, ROWS, COLUMNS, generator=generator)
    weights = (torch.rand(clients, EXPERTS, generator=generator) * 1.5 - 0.5).clamp(min=0.0)
    return values.round() if ties else values, weights


def averaged(means: WeightedMean, values: Tensor, weights: Sequence[Tensor | float]) -> Tensor:
    for value, weight in zip(values, weights, strict=True):
        means.add("x", value, weight)
    return means.mean("x")


# Oracles


def trimmed(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Of one coordinate: sort, take both ends away, average."""
    there = weights > 0
    values, weights = values[there], weights[there]
    if len(values) == 0:
        return 0.0
    order = sorted(range(len(values)), key=lambda at: (values[at], -weights[at]))
    if len(order) >= 3:
        # Of equal values, the one with the most weight is the end, at both ends.
        last = max(order, key=lambda at: (values[at], weights[at]))
        first = min((at for at in order if at != last), key=lambda at: (values[at], -weights[at]))
        order = [at for at in order if at not in (first, last)]
    return float(sum(values[at] * weights[at] for at in order) / sum(weights[at] for at in order))


def weiszfeld(values: NDArray[np.float64], weights: NDArray[np.float64], passes: int) -> NDArray[np.float64]:
    """Of one expert, with plain loops."""
    point = sum(w * v for v, w in zip(values, weights, strict=True)) / sum(weights)
    if sum(weights > 0) < 3:
        return np.asarray(point)
    for _ in range(passes):
        distances = [math.sqrt(((value - point) ** 2).sum()) for value in values]
        shares = [w / max(SMOOTHING, d) for w, d in zip(weights, distances, strict=True)]
        point = sum(s * v for v, s in zip(values, shares, strict=True)) / sum(shares)
    return np.asarray(point)


@given(seeds, st.integers(1, 7), st.booleans())
def test_the_trimmed_mean_is_that_of_a_sort(seed: int, clients: int, ties: bool) -> None:
    values, weights = drawn(seed, clients, ties)
    got = averaged(TrimmedMean(), values, list(weights))
    for expert in range(EXPERTS):
        for at in np.ndindex(ROWS, COLUMNS):
            column = values[(slice(None), expert, *at)].double().numpy()
            wanted = trimmed(column, weights[:, expert].double().numpy())
            assert float(got[(expert, *at)]) == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@given(seeds, st.integers(1, 7))
def test_the_geometric_median_is_that_of_plain_loops(seed: int, clients: int) -> None:
    values, weights = drawn(seed, clients)
    got = averaged(GeometricMedian(), values, list(weights))
    for expert in range(EXPERTS):
        mine = weights[:, expert].double().numpy()
        if mine.sum() == 0:
            assert not got[expert].any()
            continue
        wanted = weiszfeld(values[:, expert].double().numpy(), mine, PASSES)
        np.testing.assert_allclose(got[expert].numpy(), wanted, rtol=0, atol=2e-5)


@given(seeds)
def test_the_passes_come_close_to_the_least_sum_of_distances(seed: int) -> None:
    """With 6 values and one of them far away: within 1 % of what 200 passes reach."""
    values, _ = drawn(seed, 6)
    values[2] *= 100
    got = averaged(GeometricMedian(), values, [1.0] * 6).double().numpy().ravel()
    flat, ones = values.double().numpy().reshape(6, -1), np.ones(6)

    def distances(point: NDArray[np.float64]) -> float:
        return float(sum(np.linalg.norm(value - point) for value in flat))

    assert distances(got) <= 1.01 * distances(weiszfeld(flat, ones, 200))


# Properties


@pytest.mark.parametrize("rule", RULES)
@given(seed=seeds, order=st.permutations(range(5)))
def test_the_order_of_clients_changes_last_bits_only(rule: RobustRule, seed: int, order: list[int]) -> None:
    for ties in (False, True):
        values, weights = drawn(seed, 5, ties)
        one = averaged(mean_by(rule), values, list(weights))
        other = averaged(mean_by(rule), values[order], list(weights[order]))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rule", RULES)
@given(seed=seeds, size=st.sampled_from([10.0, 1e6, 1e20]), hostile=st.integers(0, 4))
def test_one_of_five_cannot_move_it_beyond_the_honest_values(
    rule: RobustRule, seed: int, size: float, hostile: int
) -> None:
    values, _ = drawn(seed, 5)
    values[hostile] *= size if rule == "trimmed_mean" else min(size, 100.0)
    honest = torch.cat([values[:hostile], values[hostile + 1 :]])
    got = averaged(mean_by(rule), values, [1.0] * 5)
    assert bool(got.isfinite().all())
    if rule == "trimmed_mean":
        assert bool((got <= honest.amax(0) + 1e-6).all() and (got >= honest.amin(0) - 1e-6).all())
    else:
        spread = (honest - honest.mean(0)).flatten(2).norm(dim=2).amax()
        assert bool(((got - honest.mean(0)).flatten(1).norm(dim=1) < 2 * spread).all())


@pytest.mark.parametrize("rule", RULES)
@given(seed=seeds, clients=st.integers(1, 2))
def test_with_fewer_than_three_clients_it_is_the_weighted_mean(
    rule: RobustRule, seed: int, clients: int
) -> None:
    values, weights = drawn(seed, clients)
    for told in (list(weights), [0.5, 2.0][:clients]):
        got, plain = averaged(mean_by(rule), values, told), averaged(WeightedMean(), values, told)
        torch.testing.assert_close(got, plain, rtol=1e-6, atol=1e-7)


def test_a_huge_value_that_is_trimmed_takes_no_digit_from_the_others() -> None:
    values = torch.tensor([[1.0], [1.25], [3e37], [1.5]])
    assert averaged(TrimmedMean(), values, [1.0] * 4).tolist() == [1.375]


# Methods

HAVE = [name for name in NAMED_METHODS if "robust" in METHODS[name].options]


def built(name: str, rule: str) -> Strategy:
    overrides = [f"strategy.name={name}", f"strategy.robust={rule}", "clients.num_clients=5"]
    return build_strategy(load_config(None, [*overrides, "clients.active_experts=2"]), K)


def a_round(strategy: Strategy, seed: int) -> tuple[ServerState, list[ClientUpdate]]:
    state = strategy.initialize(an_adapter(torch.Generator().manual_seed(0)), (K, 2), LAYERS)
    updates = updates_of(seed, [3] * 5, state.trainable)
    return state, [replace(update, rescaler_values=torch.ones(LAYERS)) for update in updates]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", HAVE)
def test_a_method_that_averages_is_not_moved_far_by_one_client(name: str, rule: str) -> None:
    strategy = built(name, rule)
    state, updates = a_round(strategy, 7)
    updates = [with_equal_weights(update) for update in updates]
    hostile = [*updates[:2], far(updates[2]), *updates[3:]]
    furthest = {}
    for which, sent in (("honest", updates), ("hostile", hostile)):
        after = strategy.aggregate_train(state, iter(sent))
        furthest[which] = max(
            float((value - state.adapter_at(2).tensors()[at]).abs().max())
            for at, value in after.adapter_at(2).tensors().items()
        )
    assert furthest["hostile"] < 3 * furthest["honest"] and furthest["honest"] > 0
    with_mean = built(name, "none").aggregate_train(state, iter(hostile)).adapter_at(2).tensors()
    assert max(float(value.abs().max()) for value in with_mean.values()) > 5


def with_equal_weights(update: ClientUpdate) -> ClientUpdate:
    counts = torch.full_like(update.counts, 10)
    return replace(update, counts=counts, tokens=10_000, trained_examples=10)


def far(update: ClientUpdate) -> ClientUpdate:
    return replace(update, delta=update.delta.combine(update.delta, lambda value, _: -100 * value))


@pytest.mark.parametrize("name", HAVE)
def test_without_a_robust_rule_every_bit_is_that_of_the_weighted_mean(name: str) -> None:
    assert type(mean_by("none")) is WeightedMean
    plain = build_strategy(load_config(None, [f"strategy.name={name}", "clients.active_experts=2"]), K)
    assert plain == built(name, "none")
    state, updates = a_round(plain, 3)
    one, other = (s.aggregate_train(state, iter(updates)) for s in (plain, built(name, "none")))
    assert_same_adapter(one.adapter, other.adapter)


@pytest.mark.parametrize("name", sorted(set(NAMED_METHODS) - set(HAVE)))
def test_a_method_for_which_it_makes_no_sense_says_why(name: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [f"strategy.name={name}", "strategy.robust=trimmed_mean"])
    assert str(error.value) == (
        f"config: strategy.robust = 'trimmed_mean': {name} has no such option, because "
        f"{METHODS[name].lacks['robust']}; flame, fedavg, ffa_lora, rolora have it (leave it at 'none')"
    )


def test_an_adapter_is_averaged_by_expert_and_by_name() -> None:
    """Of five clients only two activated expert 0: there it is their mean; elsewhere one is left out."""
    values, _ = drawn(1, 5)
    weights = torch.ones(5, EXPERTS)
    weights[2:, 0] = 0.0
    got = averaged(TrimmedMean(), values, list(weights))
    torch.testing.assert_close(got[0], values[:2, 0].mean(0))
    torch.testing.assert_close(got[1], values[:, 1].sort(0).values[1:-1].mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_run_with_a_robust_mean_differs_and_repeats_bit_for_bit(
    rule: str, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = ("clients.active_experts=2", "server.num_server_rounds=2", "strategy.name=fedavg")
    for name, chosen in (("plain", "none"), ("robust", rule), ("again", rule)):
        tiny_run(tiny_folder, tmp_path / name, *settings, f"strategy.robust={chosen}")
    assert state_bytes(tmp_path / "robust") == state_bytes(tmp_path / "again")
    assert adapter_bytes(tmp_path / "robust") != adapter_bytes(tmp_path / "plain")
