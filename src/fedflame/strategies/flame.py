"""FLAME: every client trains the full-rank adapter with k_i experts; experts are averaged by use.

Le, Tran, Hua, Chawla: FLAME, arXiv 2506.16600. The server weighs expert j of layer l of client i by
gamma_i[l,j] = (c_i[l,j] / T_i)^t * |D_i|, with c the activation counts, T the tokens trained on and
|D| the rows; attention LoRA is weighed by |D_i|. Adapts the compute: k_i experts per token; bytes and
memory of the adapter are those of the full rank, but experts without a token are not sent.

Four things here are ours; the defaults of `Flame` are the paper's, those of the configuration are what we
found best (benchmarks/). Frequencies c / T of a client sum to k_i over the experts of a layer, so that
clients with large k have more weight by construction; with `slot` the frequency is that among routed
slots, c / (T k_i), and sums to one for every client.

What is best with 8 experts per token is not best with one: the server may keep an adapter for every
tier k. Client i is given that of the k_i it trains with, and its delta is averaged into each of them, in
that of k with its weights times beta^|log2 k - log2 k_i|: nearer tiers count more. beta = 1 is one adapter
for all, as in the paper; with beta = 0 tiers learn nothing from one another. What travels is the same.

With few experts per token a larger learning rate is best: it may grow with a power of K/k_i.

|D_i| may be the rows that the client trained on in the round instead of all it holds. Where a round does
not go over all rows, clients with many would decide alone, with no more work in it than the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedflame.config.words import CountedRows, CountNormalization, RescalerMode, RescalerRule
from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import (
    ClientProfile,
    ServerState,
    TrainInstructions,
    WeightedMean,
    apply_delta,
    client_weight,
    in_client_order,
    mean_rescalers,
)


@dataclass(frozen=True)
class Flame:
    """Activation-aware aggregation at temperature t; a rescaler and, with beta < 1, an adapter per tier."""

    num_experts_per_tok: int
    """K of the model: at k = K the rescaler is 1 and fixed."""
    temperature: float = 1.0
    rescaler: RescalerRule = "learned"
    count_normalization: CountNormalization = "token"
    tier_affinity: float = 1.0
    """beta, from 0 to 1; 1 is one adapter for all tiers (the paper's)."""
    learning_rate_exponent: float = 0.0
    """The learning rate at k is that of K times (K/k) to this power; 0 is the paper's."""
    counted_rows: CountedRows = "held"
    """What |D_i| is: all rows of a client (the paper's), or those it trained on in the round."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        """`adapter` is the largest tier's, and that of every k without an adapter of its own."""
        rescalers = {k: torch.full((num_layers,), self._initial_rescaler(k)) for k in tiers}
        smaller = sorted(rescalers, reverse=True)[1:] if self.tier_affinity < 1 else []
        # Copies, because a safetensors file must not hold the same tensor twice.
        return ServerState(adapter, rescalers, tier_adapters={k: _copy(adapter) for k in smaller})

    def _initial_rescaler(self, k: int) -> float:
        return self.num_experts_per_tok / k if self.rescaler == "static" else 1.0

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        k = client.active_experts
        mode: RescalerMode = "fixed"
        if k < self.num_experts_per_tok and (self.rescaler == "learned" or self.rescaler == "mass"):
            mode = self.rescaler
        factor = (self.num_experts_per_tok / k) ** self.learning_rate_exponent
        return TrainInstructions(
            k, state.adapter_at(k), mode, state.rescalers[k], learning_rate_factor=factor
        )

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        means = {k: _AdapterMean() for k in (max(state.rescalers), *state.tier_adapters)}
        rescalers = WeightedMean()
        for update in in_client_order(updates):
            rows = client_weight(update, self.counted_rows)
            weights = expert_weights(update, rows, self.temperature, self.count_normalization)
            for k, mean in means.items():
                mean.add(update, weights, rows, self._affinity(k, update.active_experts))
            if self.rescaler in ("learned", "mass"):  # a mean of equal values may differ in its last bit
                rescalers.add(str(update.active_experts), update.rescaler_values, rows)
        adapters = {k: mean.applied(state.adapter_at(k)) for k, mean in means.items()}
        if all(adapter is state.adapter_at(k) for k, adapter in adapters.items()):
            return state
        adapter = adapters.pop(max(adapters))
        return mean_rescalers(replace(state, adapter=adapter, tier_adapters=adapters), rescalers)

    def _affinity(self, k: int, trained: int) -> float:
        """What an update that was trained with `trained` experts counts in the adapter of k."""
        return math.pow(self.tier_affinity, abs(math.log2(k / trained)))


def _copy(adapter: Adapter) -> Adapter:
    return adapter.combine(adapter, lambda value, _: value.clone())


class _AdapterMean:
    """The weighted mean of deltas, experts by their own weights and attention by rows."""

    def __init__(self) -> None:
        self._experts, self._attention = WeightedMean(), WeightedMean()

    def add(self, update: ClientUpdate, weights: Tensor, rows: int, affinity: float) -> None:
        """Take a delta in: experts with `weights` [L,E], attention with `rows`, all times `affinity`."""
        if not affinity:
            return
        for name, delta in update.delta.experts.items():
            self._experts.add(name, delta, weights[int(name.split(".")[0])] * affinity)
        for name, delta in update.delta.attention.items():
            self._attention.add(name, delta, rows * affinity)

    def applied(self, adapter: Adapter) -> Adapter:
        """The adapter plus the mean; itself without a delta."""
        if not self._experts.names():
            return adapter
        experts = {name: self._experts.mean(name) for name in self._experts.names()}
        attention = {name: self._attention.mean(name) for name in self._attention.names()}
        return adapter.combine(Adapter(experts, attention), apply_delta)


def expert_weights(
    update: ClientUpdate, rows: int, temperature: float, count_normalization: CountNormalization
) -> Tensor:
    """gamma_i [L,E] = f^t * |D_i|, f = c / T the activation frequency (the paper's), or c / (T k_i)."""
    slots = update.active_experts if count_normalization == "slot" else 1
    frequency = update.counts.to(torch.float32) / (update.tokens * slots)
    return frequency**temperature * rows
