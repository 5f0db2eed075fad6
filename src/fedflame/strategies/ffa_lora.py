"""FFA-LoRA: A stays where it started, B is trained and averaged.

Sun et al.: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.

    A = A_0,  B = sum_i p_i B_i,  p_i = |D_i| / |D|

Exact: with one A for all, B A is the mean of the clients' products. Adapts nothing to the client, but only
B travels up and has optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedflame.messages import Adapter
from fedflame.strategies.base import ServerState
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FFALoRA(FedAvg):
    """FedAvg of B."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        return replace(super().initialize(adapter, tiers, num_layers), trainable="B")
