"""FLAME: every client trains the full-rank adapter with k_i experts; experts are averaged by use.

Le, Tran, Hua, Chawla: FLAME, arXiv 2506.16600. The server weighs expert j of layer l of client i by
gamma_i[l,j] = (c_i[l,j] / T_i)^t * |D_i|, with c the activation counts, T the tokens trained on and
|D| the rows; attention LoRA is weighed by |D_i|. Adapts the compute: k_i experts per token; bytes and
memory of the adapter are those of the full rank, but experts without a token are not sent.

Frequencies c / T of a client sum to k_i over the experts of a layer, so that clients with large k have
more weight by construction. With `slot` the frequency is that among routed slots, c / (T k_i), and sums to
one for every client.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedflame.messages import Adapter, ClientUpdate, RescalerMode
from fedflame.strategies.base import (
    ClientProfile,
    ServerState,
    TrainInstructions,
    WeightedMean,
    apply_delta,
    in_client_order,
    mean_rescalers,
)


@dataclass(frozen=True)
class Flame:
    """Activation-aware aggregation at temperature t, with a rescaler per tier."""

    num_experts_per_tok: int
    """K of the model: at k = K the rescaler is 1 and fixed."""
    temperature: float = 1.0
    rescaler: Literal["learned", "none", "static", "mass"] = "learned"
    """`learned` (the paper's), `none` (s = 1), `static` (s = K/k) or `mass` (`moe.rescaler.mass_ratio`)."""
    count_normalization: Literal["token", "slot"] = "token"
    """Counts over tokens (the paper's), or over routed slots, k_i for each token."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        return ServerState(adapter, {k: torch.full((num_layers,), self._initial_rescaler(k)) for k in tiers})

    def _initial_rescaler(self, k: int) -> float:
        return self.num_experts_per_tok / k if self.rescaler == "static" else 1.0

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        k = client.active_experts
        mode: RescalerMode = "fixed"
        if k < self.num_experts_per_tok and (self.rescaler == "learned" or self.rescaler == "mass"):
            mode = self.rescaler
        return TrainInstructions(k, state.adapter, mode, state.rescalers[k])

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        experts, attention, rescalers = WeightedMean(), WeightedMean(), WeightedMean()
        for update in in_client_order(updates):
            weights = expert_weights(update, self.temperature, self.count_normalization)
            for name, delta in update.delta.experts.items():
                experts.add(name, delta, weights[int(name.split(".")[0])])
            for name, delta in update.delta.attention.items():
                attention.add(name, delta, update.num_examples)
            if self.rescaler in ("learned", "mass"):  # a mean of equal values may differ in its last bit
                rescalers.add(str(update.active_experts), update.rescaler_values, update.num_examples)
        if not experts.names():
            return state
        mean = Adapter(
            {name: experts.mean(name) for name in experts.names()},
            {name: attention.mean(name) for name in attention.names()},
        )
        return mean_rescalers(replace(state, adapter=state.adapter.combine(mean, apply_delta)), rescalers)


def expert_weights(
    update: ClientUpdate, temperature: float, count_normalization: Literal["token", "slot"] = "token"
) -> Tensor:
    """gamma_i [L,E] = f^t * |D_i|, f = c / T the activation frequency (the paper's), or c / (T k_i)."""
    slots = update.active_experts if count_normalization == "slot" else 1
    frequency = update.counts.to(torch.float32) / (update.tokens * slots)
    return frequency**temperature * update.num_examples
