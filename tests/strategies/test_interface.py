"""The exact methods on the real client: the new model is the mean of the clients' models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from tests.random_rounds import products
from tests.tiny_models import (
    EXPERTS,
    HIDDEN,
    KEY_WIDTH,
    LAYERS,
    PAD,
    RANK,
    SCALING,
    VOCABULARY,
    WIDTH,
    forbid_expert,
    tiny_adapted,
    tiny_olmoe,
)
from torch import Tensor

from fedflame.data.encoding import EncodedRow
from fedflame.messages import NOTHING, Adapter, ClientUpdate, RoundPlan, half_of
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.server.validation import validate_update
from fedflame.strategies import FedAvg, FedExLoRA, FFALoRA, FLoRA, RoLoRA
from fedflame.strategies.base import ClientProfile, ServerState, Strategy
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.codec import decode_plan, decode_update, encode_plan, encode_update

K = 2
CLIENTS = [ClientProfile(client, K, RANK, rows) for client, rows in enumerate((5, 9, 3))]
RANKS = (4, 1, 2)
"""Of the clients, for a method that adapts the rank."""
FORBIDDEN = 3
"""An expert that no router picks at k = 1."""

METHODS: dict[str, Callable[[int], Strategy]] = {
    "FFA": FFALoRA,
    "RoLoRA": RoLoRA,
    "FedEx": FedExLoRA,
    "FLoRA": FLoRA,
}
every_method = pytest.mark.parametrize("method", METHODS)


# The clients, by way of the wire format


LONGEST = 16
"""Tokens that no row has more of."""


def rows_of(client: ClientProfile) -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(client.client)
    lengths = torch.randint(6, 14, (client.num_examples,), generator=generator).tolist()
    return [
        EncodedRow(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), 2, False)
        for length in lengths
    ]


@dataclass(frozen=True)
class Round:
    """What went in, what the clients sent, what came out."""

    before: ServerState
    updates: list[ClientUpdate]
    after: ServerState


def two_rounds(strategy: Strategy, adapted: AdaptedModel) -> Iterator[Round]:
    """FLoRA's clients differ in rank."""
    ranks = RANKS if isinstance(strategy, FLoRA) else (RANK, RANK, RANK)
    clients = [replace(client, rank=rank) for client, rank in zip(CLIENTS, ranks, strict=True)]
    state = strategy.initialize(adapted.initial_adapter(5), (K,), LAYERS)
    for number in (1, 2):
        updates = [train(strategy, adapted, state, client, number) for client in clients]
        after = strategy.aggregate_train(state, iter(updates))
        yield Round(state, updates, after)
        state = after


def plan_for(strategy: Strategy, state: ServerState, client: ClientProfile, number: int) -> RoundPlan:
    told = strategy.configure_train(state, client)
    return RoundPlan(
        round=number,
        client=client.client,
        seed=7,
        active_experts=told.active_experts,
        rescaler=told.rescaler,
        rescaler_values=told.rescaler_values,
        adapter=told.adapter,
        learning_rate=0.05,
        weight_decay=0.1,
        batch_size=4,
        max_steps=4,
        trainable=told.trainable,
        merged=state.merged,
    )


def train(
    strategy: Strategy, adapted: AdaptedModel, state: ServerState, client: ClientProfile, number: int
) -> ClientUpdate:
    plan = plan_for(strategy, state, client, number)
    trained = fine_tune(adapted, rows_of(client), decode_plan(encode_plan(plan)), PAD)
    update = decode_update(encode_update(trained, plan), plan)
    validate_update(update, plan, LONGEST)
    received = update.delta.tensors()
    assert all(torch.equal(received[name], value) for name, value in trained.delta.tensors().items())
    return update


# Weight matrices in float64, by plain loops


def low_rank(adapter: Adapter) -> dict[str, Tensor]:
    """B A of every projection."""
    return {name: torch.from_numpy(value) for name, value in products(adapter).items()}


def base_weights(adapted: AdaptedModel) -> dict[str, Tensor]:
    """The frozen weights in the model now, under the names of `products`."""
    weights, found = adapted.model.state_dict(), {}
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.mlp.experts"
        for expert in range(EXPERTS):
            gate_up = weights[f"{experts}.gate_up_proj"][expert].double()
            name = f"experts.{layer}.{expert}"
            found[f"{name}.gate"], found[f"{name}.up"] = gate_up[:WIDTH], gate_up[WIDTH:]
            found[f"{name}.down"] = weights[f"{experts}.down_proj"][expert].double()
    for name, value in weights.items():
        if name.endswith(".base_layer.weight"):
            found[f"attention.{name.removesuffix('.base_layer.weight')}"] = value.double()
    return found


def effective_weights(adapted: AdaptedModel, state: ServerState) -> dict[str, Tensor]:
    adapted.load(state.adapter, torch.ones(LAYERS), state.merged)
    low = low_rank(state.adapter)
    return {name: weight + SCALING * low[name] for name, weight in base_weights(adapted).items()}


def mean_of_the_clients(adapted: AdaptedModel, round_: Round) -> dict[str, Tensor]:
    """W + scaling * sum_k p_k B_k A_k with the W that the clients had."""
    adapted.load(round_.before.adapter, torch.ones(LAYERS), round_.before.merged)
    mean, rows = base_weights(adapted), sum(client.num_examples for client in CLIENTS)
    for update in round_.updates:
        given = round_.before.adapter.with_rank(update.delta.rank)
        low = low_rank(given.combine(update.delta, torch.add))
        mean = {
            name: value + SCALING * update.num_examples / rows * low[name] for name, value in mean.items()
        }
    return mean


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@every_method
def test_the_new_model_is_the_mean_of_the_clients_models(method: str) -> None:
    adapted = tiny_adapted()
    forbid_expert(adapted, FORBIDDEN)
    for round_ in two_rounds(METHODS[method](1), adapted):
        assert not any(update.counts[:, FORBIDDEN].any() for update in round_.updates)
        before = effective_weights(adapted, round_.before)
        after = effective_weights(adapted, round_.after)
        assert furthest(after, mean_of_the_clients(adapted, round_)) < 5e-7
        assert furthest(after, before) > 0.02
        for name, value in after.items():
            if f".{FORBIDDEN}." in name and name.startswith("experts."):
                assert torch.equal(value, before[name])
            else:
                assert rested(name, round_.updates) or not torch.equal(value, before[name])
    shapes = {tuple(value.shape) for value in after.values()}
    assert {(WIDTH, HIDDEN), (HIDDEN, WIDTH), (KEY_WIDTH, HIDDEN)} <= shapes


def rested(name: str, updates: list[ClientUpdate]) -> bool:
    """Whether it is a matrix of an expert that no client activated."""
    kind, layer, expert = name.split(".")[:3]
    return kind == "experts" and not any(update.counts[int(layer), int(expert)] for update in updates)


def test_plain_averaging_of_a_and_b_is_not_that_mean() -> None:
    adapted = tiny_adapted()
    for round_ in two_rounds(FedAvg(K), adapted):
        after = effective_weights(adapted, round_.after)
        assert furthest(after, mean_of_the_clients(adapted, round_)) > 1e-3


def test_ffa_never_moves_a_and_moves_every_b_of_an_activated_expert() -> None:
    adapted = tiny_adapted()
    start = adapted.initial_adapter(5).tensors()
    for round_ in two_rounds(FFALoRA(K), adapted):
        for update in round_.updates:
            for name, delta in update.delta.tensors().items():
                if half_of(name) == "A":
                    assert not delta.any()
                elif name.startswith("experts."):
                    activated = update.counts[int(name.split(".")[1])] > 0
                    assert torch.equal(delta.flatten(1).any(1), activated)
                else:
                    assert delta.any()
        for name, value in round_.after.adapter.tensors().items():
            assert half_of(name) == "B" or torch.equal(value, start[name])
        assert round_.after.merged is NOTHING


@pytest.mark.parametrize(("method", "ranks"), [("FLoRA", sum(RANKS)), ("FedEx", 3 * RANK)])
def test_merged_factors_are_stacked_round_after_round(method: str, ranks: int) -> None:
    strategy = METHODS[method](K)
    rounds = list(two_rounds(strategy, tiny_adapted()))
    assert [round_.after.merged.rank for round_ in rounds] == [ranks, 2 * ranks]
    size = 4 * sum(value.numel() for value in rounds[0].after.merged.tensors().values())
    plan = plan_for(strategy, rounds[0].after, CLIENTS[0], 2)
    with_factors, without = (encode_plan(plan), encode_plan(replace(plan, merged=NOTHING)))
    assert size < len(with_factors) - len(without) < 1.05 * size


@every_method
def test_the_base_is_pristine_again_without_merged_factors(method: str) -> None:
    adapted = tiny_adapted()
    *_, last = two_rounds(METHODS[method](K), adapted)
    adapted.load(last.after.adapter, torch.ones(LAYERS), last.after.merged)
    adapted.load(last.after.adapter, torch.ones(LAYERS))
    now = adapted.model.state_dict()
    for name, value in tiny_olmoe().state_dict().items():
        wrapped = name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(now[wrapped if wrapped in now else name], value), name
