"""What a federated method is: three pure functions over an explicit server state.

A method is a frozen dataclass in a file of its own. It knows tensors and messages, not models, not
configs and not the engine that carries the messages. The hook names are Flower's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fedflame.config.words import CountedRows, RescalerMode, Trainable
from fedflame.messages import NOTHING, Adapter, ClientUpdate


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from one round to the next, and all that evaluation needs."""

    adapter: Adapter
    rescalers: Mapping[int, Tensor]
    """Tier k -> [L] s, for clients of that tier and for evaluation at that k."""
    merged: Adapter = NOTHING
    """Factors that are part of the frozen base from now on: every weight W is W + (alpha/r) B A.

    Names and layout are the adapter's, alpha/r is that of the run, the rank is any."""
    trainable: Trainable = "both"
    """The half that the clients train in the coming round."""
    ranks: Mapping[int, int] = field(default_factory=dict)
    """Client -> rank, of clients that pruned themselves below what they afford (HetLoRA)."""
    tier_adapters: Mapping[int, Adapter] = field(default_factory=dict)
    """Tier k -> the adapter of that k, where a method keeps one; at every other k it is `adapter`."""

    def adapter_at(self, k: int) -> Adapter:
        """The adapter that is trained and used with k experts per token."""
        return self.tier_adapters.get(k, self.adapter)

    def rescaler_at(self, k: int, num_layers: int) -> Tensor:
        """[num_layers] s that is used with k experts per token; 1 where no client had this k."""
        return self.rescalers[k] if k in self.rescalers else torch.ones(num_layers)

    def total_at(self, k: int) -> Adapter:
        """That adapter and merged factors as one adapter of the base model as it was before the run."""
        return self.adapter_at(k).concatenate(self.merged)


@dataclass(frozen=True)
class ClientProfile:
    """What the server knows of a client."""

    client: int
    active_experts: int
    """Experts per token that its machine affords (k_i), or fewer in its turn; see `k_rotation`."""
    rank: int
    """LoRA rank that its machine affords (r_i), for methods that adapt the rank."""
    num_examples: int
    """Rows it holds (|D|); 0 where that is not known yet."""


@dataclass(frozen=True)
class TrainInstructions:
    """The part of a `RoundPlan` that the method decides."""

    active_experts: int
    adapter: Adapter
    rescaler: RescalerMode
    rescaler_values: Tensor
    """[L] s per MoE layer at the start of the round."""
    trainable: Trainable = "both"
    learning_rate_factor: float = 1.0
    """On the run's learning rate of the round."""
    rank_penalty: float = 0.0
    """Strength of a penalty on the ranks from `kept_rank` on; see `regularizers`."""
    kept_rank: int = 0


class Strategy(Protocol):
    """One federated method."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        """The state before round 1, with a rescaler [num_layers] for every k in `tiers`."""

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        """What this client shall train and how; a rank method cuts the adapter here."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """The next state, from a stream of valid updates in rising client order."""


def client_weight(update: ClientUpdate, counted_rows: CountedRows) -> int:
    """What the client counts for in a mean: |D_i|, or the part of it that it trained on in the round."""
    return update.num_examples if counted_rows == "held" else update.trained_examples


def in_client_order(updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
    """Pass the stream on, refusing one whose order would change the sums' last bits."""
    last = -1
    for update in updates:
        if update.client <= last:
            raise ValueError(f"updates must come in rising client order: {update.client} after {last}")
        last = update.client
        yield update


class WeightedMean:
    """Running sum of w x and of w per name, in fp32: one accumulator, whatever the clients' number.

    A weight is a number, or [E] values for banks whose first dimension is the expert.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float) -> None:
        weights = torch.as_tensor(weight, dtype=torch.float32)
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(value, dtype=torch.float32)
            self._weights[name] = torch.zeros_like(weights)
        self._sums[name] += (
            value * weights.view(-1, *[1] * (value.dim() - 1)) if weights.dim() else value * weights
        )
        self._weights[name] += weights

    def names(self) -> list[str]:
        return list(self._sums)

    def mean(self, name: str) -> Tensor:
        """Sum of w x over sum of w; zero where the weights sum to zero."""
        weights = self._weights[name]
        if weights.dim():
            weights = weights.view(-1, *[1] * (self._sums[name].dim() - 1))
        return torch.where(weights > 0, self._sums[name] / weights, 0.0)


def apply_delta(value: Tensor, delta: Tensor) -> Tensor:
    """The value plus its delta, with the value's own bits where the delta is zero."""
    return torch.where(delta == 0, value, value + delta)


def client_values(state: ServerState, update: ClientUpdate) -> Adapter:
    """A and B at the end of the client's training, of the rank that it trained."""
    return state.adapter.with_rank(update.delta.rank).combine(update.delta, torch.add)


def weighted(adapter: Adapter, weight: float) -> Adapter:
    """The adapter with `weight` times its products: B carries the weight."""
    return Adapter.from_factors({name: (weight * b, a) for name, (b, a) in adapter.factors().items()})


def stacked(state: ServerState, updates: Iterable[ClientUpdate], counted_rows: CountedRows) -> Adapter:
    """Factors whose product is sum_i p_i B_i A_i, one client's ranks after another's.

    p_i is the client's share of the rows that are counted.

    It holds the values of all clients. `NOTHING` without updates.
    """
    clients, rows = [], []
    for update in in_client_order(updates):
        clients.append(client_values(state, update))
        rows.append(client_weight(update, counted_rows))
    parts = [weighted(values, count / sum(rows)) for values, count in zip(clients, rows, strict=True)]
    return NOTHING.concatenate(*parts)


def mean_rescalers(state: ServerState, means: WeightedMean) -> ServerState:
    """Replace s of every tier that has a mean under the name of its k; other tiers keep theirs."""
    measured = {int(name): means.mean(name) for name in means.names()}
    return replace(state, rescalers={**state.rescalers, **measured})
