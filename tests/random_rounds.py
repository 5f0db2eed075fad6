"""Random adapters and updates for aggregation, every dimension different, and their products in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.message_samples import adapter_of, random_numbers
from torch import Tensor

from fedflame.config.words import Trainable
from fedflame.messages import Adapter, ClientUpdate, is_trained
from fedflame.strategies.base import ServerState, Strategy

LAYERS, EXPERTS, RANK, HIDDEN, WIDTH = 2, 5, 3, 8, 4
K = 8

Products = dict[str, NDArray[np.float64]]


def an_adapter(generator: torch.Generator, scale: float = 1.0, rank: int = RANK) -> Adapter:
    def scaled(generator: torch.Generator, *shape: int) -> Tensor:
        return scale * random_numbers(generator, *shape)

    return adapter_of((LAYERS, EXPERTS, rank, HIDDEN, WIDTH), scaled, generator)


def filled(value: float) -> Adapter:
    """Of one value everywhere."""
    like = an_adapter(torch.Generator())
    return like.combine(like, lambda one, _: torch.full_like(one, value))


def an_update(
    generator: torch.Generator,
    client: int,
    active_experts: int = 2,
    rank: int = RANK,
    trainable: Trainable = "both",
) -> ClientUpdate:
    """Random values; about a third of the counts are zero, and deltas of a trained half are nowhere zero."""
    tokens = int(torch.randint(1, 100_000, (), generator=generator))
    counts = (torch.rand(LAYERS, EXPERTS, generator=generator) * 1.5 - 0.5).clamp(min=0.0).mul(tokens).long()
    rows = int(torch.randint(1, 1000, (), generator=generator))
    return ClientUpdate(
        round=1,
        client=client,
        active_experts=active_experts,
        delta=half_only(an_adapter(generator, scale=0.1, rank=rank), trainable),
        rescaler_values=1 + torch.rand(LAYERS, generator=generator),
        counts=counts,
        tokens=tokens,
        num_examples=rows,
        trained_examples=int(torch.randint(1, rows + 1, (), generator=generator)),
        steps=5,
        loss=1.0,
        trainable=trainable,
    )


def updates_of(seed: int, ranks: Sequence[int], trainable: Trainable = "both") -> list[ClientUpdate]:
    """One update per rank."""
    generator = torch.Generator().manual_seed(seed)
    return [an_update(generator, client, rank=r, trainable=trainable) for client, r in enumerate(ranks)]


def a_round(strategy: Strategy, seed: int, ranks: Sequence[int]) -> tuple[ServerState, list[ClientUpdate]]:
    """A state of the method, and an update per rank."""
    state = strategy.initialize(an_adapter(torch.Generator().manual_seed(seed)), (K,), LAYERS)
    return state, updates_of(seed + 1, ranks)


def half_only(adapter: Adapter, trainable: Trainable) -> Adapter:
    """The adapter with zeros in the half that is not trained."""
    return Adapter.from_tensors(
        {
            name: value if is_trained(name, trainable) else torch.zeros_like(value)
            for name, value in adapter.tensors().items()
        }
    )


def projections(adapter: Adapter) -> dict[str, tuple[Any, Any]]:
    """B [out,R] and A [R,in] in float64 of every projection of every expert, and of attention."""
    values = {name: value.double().numpy() for name, value in adapter.tensors().items()}
    found = {}
    for name in values:
        if name.endswith(".A2"):
            layer = name.removesuffix(".A2")
            a1, b1, a2, b2 = (values[f"{layer}.{bank}"] for bank in ("A1", "B1", "A2", "B2"))
            _, r, width = a2.shape
            for expert in range(len(a2)):
                found[f"{layer}.{expert}.gate"] = b1[expert][:width], a1[expert][:r]
                found[f"{layer}.{expert}.up"] = b1[expert][width:], a1[expert][r:]
                found[f"{layer}.{expert}.down"] = b2[expert], a2[expert]
        elif name.startswith("attention.") and name.endswith(".A"):
            module = name.removesuffix(".A")
            found[module] = values[f"{module}.B"], values[name]
    return found


def products(adapter: Adapter) -> Products:
    """B A of every projection, in float64."""
    return {name: b @ a for name, (b, a) in projections(adapter).items()}


def cut_values(start: Adapter, update: ClientUpdate) -> dict[str, tuple[Any, Any]]:
    """B and A of a client in float64: the first ranks of what the server had, plus the client's delta."""
    ranks = update.delta.rank
    delta = projections(update.delta)
    return {
        name: (b[:, :ranks] + delta[name][0], a[:ranks] + delta[name][1])
        for name, (b, a) in projections(start).items()
    }


def mean_products(start: Adapter, updates: Sequence[ClientUpdate]) -> Products:
    """sum_i p_i B_i A_i with p_i = |D_i| / |D|."""
    rows = sum(update.num_examples for update in updates)
    total: Products = {}
    for update in updates:
        for name, (b, a) in cut_values(start, update).items():
            total[name] = total.get(name, 0.0) + update.num_examples / rows * (b @ a)
    return total


def assert_close(got: Mapping[str, Any], wanted: Mapping[str, Any], atol: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=atol, err_msg=name)
