"""What holds for all methods: who may come when, what is left alone, and agreement where clients agree."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.random_rounds import (
    EXPERTS,
    LAYERS,
    RANK,
    K,
    Products,
    an_adapter,
    an_update,
    assert_close,
    cut_values,
    half_only,
    products,
    updates_of,
)
from tests.same_bits import assert_same_adapter
from torch import Tensor

from fedflame.config.load import load_config
from fedflame.config.methods import METHODS, NAMED_METHODS, OF_ALL_METHODS
from fedflame.config.strategy_section import StrategyConfig
from fedflame.experiment.method import build_strategy
from fedflame.messages import NOTHING, Adapter, ClientUpdate
from fedflame.strategies import (
    FedAvg,
    FedExLoRA,
    FFALoRA,
    Flame,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    RoLoRA,
    Strategy,
)
from fedflame.strategies.base import ClientProfile, ServerState

STRATEGIES: dict[str, Strategy] = {
    "flame": Flame(K),
    "fedavg": FedAvg(K),
    "ffa_lora": FFALoRA(K),
    "rolora": RoLoRA(K),
    "fedex_lora": FedExLoRA(K),
    "hetlora": HetLoRA(K),
    "flexlora": FlexLoRA(K),
    "flora": FLoRA(K),
}
STACKING = {"fedex_lora", "flexlora", "flora"}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def a_state(name: str) -> ServerState:
    generator = torch.Generator().manual_seed(0)
    return STRATEGIES[name].initialize(an_adapter(generator), (K, 4, 2), LAYERS)


def a_round(name: str) -> tuple[ServerState, list[ClientUpdate]]:
    state = a_state(name)
    return state, updates_of(1, (RANK, RANK, RANK), state.trainable)


def total_products(state: ServerState) -> Products:
    """Of everything that is added to the base as it was before the run."""
    return plus(products(state.adapter), state.merged)


def plus(dense: Products, merged: Adapter) -> Products:
    others = products(merged)
    return {name: value + others[name] if others else value for name, value in dense.items()}


def assert_same_state(got: ServerState, wanted: ServerState) -> None:
    assert_same_adapter(got.adapter, wanted.adapter)
    assert_same_adapter(got.merged, wanted.merged)
    assert got.trainable == wanted.trainable
    assert got.rescalers.keys() == wanted.rescalers.keys()
    assert all(torch.equal(got.rescalers[k], s) for k, s in wanted.rescalers.items())


# Configuration and documents


def test_every_method_of_the_configuration_is_built_is_tested_here_and_has_its_options() -> None:
    assert set(STRATEGIES) == set(NAMED_METHODS)
    for name in NAMED_METHODS:
        strategy = build_strategy(load_config(None, [f"strategy.name={name}"]), K)
        assert type(strategy) is type(STRATEGIES[name])
    assert (
        set().union(*(method.options for method in METHODS.values()))
        == set(StrategyConfig.model_fields) - OF_ALL_METHODS
    )


def test_the_table_of_strategies_has_every_method_once() -> None:
    document = Path(__file__).parents[2] / "docs" / "strategies.md"
    rows = [line for line in document.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(NAMED_METHODS)


# The stream


@every_strategy
def test_a_round_without_updates_changes_nothing(name: str) -> None:
    state = a_state(name)
    assert STRATEGIES[name].aggregate_train(state, iter([])) is state


@every_strategy
def test_updates_out_of_client_order_are_refused(name: str) -> None:
    state, updates = a_round(name)
    for wrong, second in (([updates[0], updates[2], updates[1]], 1), ([updates[1], updates[1]], 1)):
        with pytest.raises(ValueError, match=f"rising client order: {second} after"):
            STRATEGIES[name].aggregate_train(state, iter(wrong))


@every_strategy
def test_aggregation_leaves_the_old_state_and_the_updates_alone(name: str) -> None:
    (state, updates), (same_state, same_updates) = a_round(name), a_round(name)
    STRATEGIES[name].aggregate_train(state, updates)
    assert_same_state(state, same_state)
    for update, same in zip(updates, same_updates, strict=True):
        assert_same_adapter(update.delta, same.delta)


@every_strategy
def test_the_same_round_gives_the_same_bits(name: str) -> None:
    one, other = (STRATEGIES[name].aggregate_train(*a_round(name)) for _ in range(2))
    assert_same_state(one, other)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in STACKING])
def test_of_a_stream_one_update_at_most_is_alive_when_the_next_is_made(name: str) -> None:
    state = a_state(name)
    generator = torch.Generator().manual_seed(0)
    made: list[tuple[weakref.ref[ClientUpdate], weakref.ref[Tensor]]] = []
    alive: list[tuple[int, int]] = []

    def stream() -> Iterator[ClientUpdate]:
        for client in range(6):
            alive.append(alive_now())
            update = an_update(generator, client)
            made.append((weakref.ref(update), weakref.ref(update.delta.experts["0.A1"])))
            yield update
            del update

    def alive_now() -> tuple[int, int]:
        updates, tensors = zip(*made, strict=True) if made else ((), ())
        return sum(ref() is not None for ref in updates), sum(ref() is not None for ref in tensors)

    STRATEGIES[name].aggregate_train(state, stream())
    assert len(made) == 6
    assert max(alive) == (1, 1)
    assert alive_now() == (0, 0)


# Algebra


@every_strategy
def test_which_client_has_which_number_does_not_matter(name: str) -> None:
    """No client is special: with numbers exchanged, sums differ in rounding at most."""
    state, updates = a_round(name)
    turned = [replace(updates[old], client=new) for new, old in enumerate((2, 0, 1))]
    one, other = (STRATEGIES[name].aggregate_train(state, given) for given in (updates, turned))
    assert_close(total_products(one), total_products(other))
    moved = total_products(state)
    assert max(abs(value - moved[key]).max() for key, value in total_products(one).items()) > 0.05


@pytest.mark.parametrize("name", [name for name in STRATEGIES if "counted_rows" in METHODS[name].options])
def test_a_client_counts_by_the_rows_it_holds_or_by_those_it_trained_on(name: str) -> None:
    """The one is the other where a client holds no more rows than it trained on."""
    state, updates = a_round(name)
    by_trained = replace(STRATEGIES[name], counted_rows="trained")  # type: ignore[type-var]
    no_more = [replace(update, num_examples=update.trained_examples) for update in updates]
    got = by_trained.aggregate_train(state, updates)
    assert_same_state(got, STRATEGIES[name].aggregate_train(state, no_more))
    held = total_products(STRATEGIES[name].aggregate_train(state, updates))
    assert max(abs(value - held[key]).max() for key, value in total_products(got).items()) > 0.01


@every_strategy
@pytest.mark.parametrize("clients", [1, 4])
def test_where_all_clients_are_the_same_the_new_model_is_theirs(name: str, clients: int) -> None:
    state = a_state(name)
    update = an_update(torch.Generator().manual_seed(9), 0)
    alike = replace(
        update,
        delta=half_only(update.delta, "B"),
        counts=torch.full((LAYERS, EXPERTS), 3),
        tokens=7,
        trainable="B",
    )
    new = STRATEGIES[name].aggregate_train(state, [replace(alike, client=c) for c in range(clients)])
    theirs = {key: b @ a for key, (b, a) in cut_values(state.adapter, alike).items()}
    assert_close(total_products(new), plus(theirs, state.merged))


@every_strategy
def test_a_client_is_told_the_rank_that_it_affords_where_the_method_adapts_it(name: str) -> None:
    state, strategy = a_state(name), STRATEGIES[name]
    told = strategy.configure_train(state, ClientProfile(3, 2, rank=RANK, num_examples=5))
    assert told.adapter is state.adapter
    assert told.trainable == state.trainable
    assert told.rescaler_values is state.rescalers[told.active_experts]
    if name == "flame":
        assert told.active_experts == 2
        assert strategy.configure_train(state, ClientProfile(3, 2, 1, 5)).adapter is state.adapter
        return
    assert (told.active_experts, told.rescaler) == (K, "fixed")
    assert_same_adapter(
        strategy.configure_train(state, ClientProfile(3, 2, 1, 5)).adapter, state.adapter.with_rank(1)
    )


@every_strategy
def test_merged_factors_are_for_methods_that_say_so(name: str) -> None:
    new = STRATEGIES[name].aggregate_train(*a_round(name))
    assert (new.merged is not NOTHING) == (name in ("flora", "fedex_lora"))
    assert new.adapter.rank == RANK
