"""FLAME: every client trains the full-rank adapter with k_i experts; the server weighs experts by their use.

Le, Tran, Hua, Chawla: FLAME, arXiv 2506.16600. The server averages expert j of layer l with the weight
gamma_i[l,j] = (c_i[l,j] / T_i)^t * |D_i| of client i. Here c are the activation counts, T the tokens trained
on and |D| the rows. Attention LoRA has the weight |D_i|. The method adapts the compute to the client: k_i
experts per token. The adapter has the full rank on every client, but experts without a token are not sent.

Four options are ours. The defaults of `Flame` are the paper's; the defaults of the configuration are those
that we measured to be best (benchmarks/).

- `count_normalization`: the frequencies c / T of a client sum to k_i over the experts of a layer, so clients
  with a large k weigh more. With `slot` the frequency is c / (T k_i), which sums to one for every client.
- `tier_affinity`: the best adapter for 8 experts per token is not the best for one. With beta < 1 the server
  keeps one adapter per tier k. Client i trains the adapter of its k_i. Its delta is averaged into the adapter
  of every k, with its weights times beta^|log2 k - log2 k_i|. With beta = 1 all tiers have one adapter, as in
  the paper; with beta = 0 the tiers share nothing. The bytes sent are the same.
- `learning_rate_exponent`: a larger learning rate is best with few experts per token. It may grow with a
  power of K/k_i.
- `counted_rows`: |D_i| may be the rows that the client trained on in the round instead of all that it holds.
  If a round covers only part of the rows, clients with many rows would otherwise dominate without training
  more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedflame.config.words import CountedRows, CountNormalization, RescalerMode, RescalerRule, RobustRule
from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import (
    ClientProfile,
    ServerState,
    TrainInstructions,
    apply_delta,
    client_weight,
    in_client_order,
    mean_rescalers,
)
from fedflame.strategies.robust import mean_by


@dataclass(frozen=True)
class Flame:
    """Activation-aware aggregation with rescalers and, for beta < 1, one adapter per tier."""

    num_experts_per_tok: int
    """K of the model. For k = K the rescaler is fixed at 1."""
    temperature: float = 1.0
    """t, the exponent of the activation frequency in the weights."""
    rescaler: RescalerRule = "learned"
    count_normalization: CountNormalization = "token"
    tier_affinity: float = 1.0
    """beta, from 0 to 1; 1 is one adapter for all tiers (the paper's choice)."""
    learning_rate_exponent: float = 0.0
    """The learning rate at k is that of K times (K/k) to this power; 0 is the paper's choice."""
    counted_rows: CountedRows = "held"
    """What |D_i| counts: all rows of a client (the paper), or the rows that it trained on in the round."""
    robust: RobustRule = "none"
    """How values and rescalers are averaged; see `strategies.robust`."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        """Return the state before round 1. With beta < 1, each k but the largest gets a copy of `adapter`."""
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
        means = {k: _AdapterMean(self.robust) for k in (max(state.rescalers), *state.tier_adapters)}
        rescalers = mean_by(self.robust)
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
        """Return the factor on the weights of an update from `trained` experts, in the adapter of tier k."""
        return math.pow(self.tier_affinity, abs(math.log2(k / trained)))


def _copy(adapter: Adapter) -> Adapter:
    return adapter.combine(adapter, lambda value, _: value.clone())


class _AdapterMean:
    """Weighted mean of deltas: each expert has its own weight; attention has the client's rows."""

    def __init__(self, rule: RobustRule) -> None:
        self._experts, self._attention = mean_by(rule), mean_by(rule)

    def add(self, update: ClientUpdate, weights: Tensor, rows: int, affinity: float) -> None:
        """Add a delta: experts with `weights` [L,E], attention with `rows`, all times `affinity`."""
        if not affinity:
            return
        for name, delta in update.delta.experts.items():
            self._experts.add(name, delta, weights[int(name.split(".")[0])] * affinity)
        for name, delta in update.delta.attention.items():
            self._attention.add(name, delta, rows * affinity)

    def applied(self, adapter: Adapter) -> Adapter:
        """Return the adapter plus the mean, or the adapter itself if no delta was added."""
        if not self._experts.names():
            return adapter
        experts = {name: self._experts.mean(name) for name in self._experts.names()}
        attention = {name: self._attention.mean(name) for name in self._attention.names()}
        return adapter.combine(Adapter(experts, attention), apply_delta)


def expert_weights(
    update: ClientUpdate, rows: int, temperature: float, count_normalization: CountNormalization
) -> Tensor:
    """Return gamma_i [L,E] = f^t * |D_i|; f is c / T (the paper) or, with `slot`, c / (T k_i)."""
    slots = update.active_experts if count_normalization == "slot" else 1
    frequency = update.counts.to(torch.float32) / (update.tokens * slots)
    return frequency**temperature * rows
