"""FFA-LoRA: A keeps its initial value; only B is trained and averaged.

Sun et al.: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.

    A = A_0,  B = sum_i p_i B_i,  p_i = |D_i| / |D|

The aggregation is exact: since all clients have the same A, B A is the mean of their products. The method
does not adapt to unequal clients. Only B is sent to the server, and only B has optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedflame.messages import Adapter
from fedflame.strategies.base import ServerState
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FFALoRA(FedAvg):
    """FedAvg of B, with A fixed."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        return replace(super().initialize(adapter, tiers, num_layers), trainable="B")
