"""FedAvg: every client runs the same number of experts and is weighed by its rows.

McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data,
arXiv 1602.05629. With k = the smallest client's it is the trivial baseline of the FLAME paper; with
k = K it is the bound that no unequal federation can afford.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import (
    ClientProfile,
    ServerState,
    TrainInstructions,
    WeightedMean,
    apply_delta,
    in_client_order,
)


@dataclass(frozen=True)
class FedAvg:
    """Plain weighted averaging at one k for all, without a rescaler."""

    active_experts: int
    """Experts per token on every client (k)."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        return ServerState(adapter, {k: torch.ones(num_layers) for k in {*tiers, self.active_experts}})

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        return TrainInstructions(
            self.active_experts, state.adapter, "fixed", state.rescalers[self.active_experts]
        )

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        means = WeightedMean()
        for update in in_client_order(updates):
            for name, delta in update.delta.tensors().items():
                means.add(name, delta, update.num_examples)
        if not means.names():
            return state
        mean = Adapter.from_tensors({name: means.mean(name) for name in means.names()})
        return replace(state, adapter=state.adapter.combine(mean, apply_delta))
