"""The interface of a federated method: three pure functions over an explicit server state.

A method is a frozen dataclass in a file of its own. It knows tensors and messages, but no models, no
configuration and no engine. The names of the three functions are Flower's.
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
class Past:
    """What the rounds have measured of plans and updates, by which they judge the updates to come."""

    reach: float = 0.0
    """The furthest that a plan let a client move a value, where rounding errors are fed back; see
    `training.reach`."""
    paces: tuple[float, ...] = ()
    """Paces of the last updates that were used; see `server.clipping`."""
    rescaler_paces: tuple[float, ...] = ()
    """The same of their learned rescalers."""


@dataclass(frozen=True)
class ServerState:
    """The server's state between two rounds. It is all that the next round and the evaluation need."""

    adapter: Adapter
    rescalers: Mapping[int, Tensor]
    """Tier k -> rescalers s [L], for clients of that tier and for evaluation at that k."""
    merged: Adapter = NOTHING
    """Factors that are now part of the frozen base: every weight W became W + (alpha/r) B A.

    They have the names and layout of the adapter and any rank. alpha/r is that of the run."""
    trainable: Trainable = "both"
    """The half of the adapter that clients train in the next round."""
    ranks: Mapping[int, int] = field(default_factory=dict)
    """Client -> rank, for clients that pruned themselves below the rank that they afford (HetLoRA)."""
    tier_adapters: Mapping[int, Adapter] = field(default_factory=dict)
    """Tier k -> adapter, if a method keeps one per tier. Every other k uses `adapter`."""
    past: Past = Past()
    """The rounds write it; a method leaves it as it is."""

    def adapter_at(self, k: int) -> Adapter:
        """Return the adapter that is trained and used with k experts per token."""
        return self.tier_adapters.get(k, self.adapter)

    def rescaler_at(self, k: int, num_layers: int) -> Tensor:
        """[num_layers] s that is used with k experts per token; 1 where no client had this k."""
        return self.rescalers[k] if k in self.rescalers else torch.ones(num_layers)

    def total_at(self, k: int) -> Adapter:
        """Return `adapter_at(k)` and the merged factors as one adapter for the original base model."""
        return self.adapter_at(k).concatenate(self.merged)


@dataclass(frozen=True)
class ClientProfile:
    """What the server knows about a client."""

    client: int
    active_experts: int
    """Experts per token in this round: what its machine affords (k_i), or fewer; see `k_rotation`."""
    rank: int
    """LoRA rank that its machine affords (r_i), for methods that adapt the rank."""
    num_examples: int
    """Rows that it holds (|D|); 0 if that is not known yet."""


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
    """Multiplies the learning rate of the round."""
    rank_penalty: float = 0.0
    """Strength of the penalty on the ranks after the first `kept_rank`; see `regularizers`."""
    kept_rank: int = 0


class Strategy(Protocol):
    """One federated method."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        """Return the state before round 1, with rescalers [num_layers] for every k in `tiers`."""

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        """Return what this client trains and how. Methods with unequal ranks cut the adapter here."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        """Return the next state from a stream of validated updates in ascending client order."""


def client_weight(update: ClientUpdate, counted_rows: CountedRows) -> int:
    """Return the client's weight in a mean: |D_i|, or the rows that it trained on in the round."""
    return update.num_examples if counted_rows == "held" else update.trained_examples


def in_client_order(updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
    """Yield the updates and check their order, because another order would change the last bits of the sums.

    Raises:
        ValueError: the client numbers do not rise.
    """
    last = -1
    for update in updates:
        if update.client <= last:
            raise ValueError(f"updates must come in rising client order: {update.client} after {last}")
        last = update.client
        yield update


class WeightedMean:
    """Weighted mean per name, from running sums of w x and of w in fp32. Its memory holds one adapter.

    A weight is a number, or a tensor [E] for a bank, whose first dimension is the expert.
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
        """Return sum(w x) / sum(w); zero where the weights sum to zero."""
        weights = self._weights[name]
        if weights.dim():
            weights = weights.view(-1, *[1] * (self._sums[name].dim() - 1))
        return torch.where(weights > 0, self._sums[name] / weights, 0.0)


def apply_delta(value: Tensor, delta: Tensor) -> Tensor:
    """Return value + delta. Where the delta is zero, the bits of the value stay, even those of -0.0."""
    return torch.where(delta == 0, value, value + delta)


def client_values(state: ServerState, update: ClientUpdate) -> Adapter:
    """Return A and B after the client's training, at the rank that it trained."""
    return state.adapter.with_rank(update.delta.rank).combine(update.delta, torch.add)


def weighted(adapter: Adapter, weight: float) -> Adapter:
    """Return an adapter whose products B A are multiplied by `weight`; the factor goes into B."""
    return Adapter.from_factors({name: (weight * b, a) for name, (b, a) in adapter.factors().items()})


def stacked(state: ServerState, updates: Iterable[ClientUpdate], counted_rows: CountedRows) -> Adapter:
    """Return stacked factors whose product is sum_i p_i B_i A_i; their rank is the sum of the clients' ranks.

    p_i is the client's share of the counted rows. All clients' values are in memory at the same time. Without
    updates the result is `NOTHING`.
    """
    clients, rows = [], []
    for update in in_client_order(updates):
        clients.append(client_values(state, update))
        rows.append(client_weight(update, counted_rows))
    parts = [weighted(values, count / sum(rows)) for values, count in zip(clients, rows, strict=True)]
    return NOTHING.concatenate(*parts)


def mean_rescalers(state: ServerState, means: WeightedMean) -> ServerState:
    """Replace s of every tier k that `means` has under the name str(k); the other tiers keep theirs."""
    measured = {int(name): means.mean(name) for name in means.names()}
    return replace(state, rescalers={**state.rescalers, **measured})
