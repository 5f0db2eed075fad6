"""RoLoRA: clients train B in one round and A in the next.

Chen et al.: Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, arXiv 2409.02346.

    odd rounds: B = sum_i p_i B_i, A fixed;  even rounds: A = sum_i p_i A_i, B fixed;  p_i = |D_i| / |D|

The aggregation is exact, because in every round one factor is the same on all clients. The method does not
adapt to unequal clients. Only the trained half is sent to the server and has optimizer state. B comes first:
while it is zero, A has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import ServerState
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class RoLoRA(FedAvg):
    """FedAvg of B and of A in turn."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        return replace(super().initialize(adapter, tiers, num_layers), trainable="B")

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        averaged = super().aggregate_train(state, updates)
        if averaged is state:  # without an update the same half is trained again
            return state
        return replace(averaged, trainable="A" if state.trainable == "B" else "B")
