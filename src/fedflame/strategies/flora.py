"""FLoRA: the clients' factors are stacked and merged into the base, and LoRA is initialized again.

Wang et al.: FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations, NeurIPS 2024, arXiv 2409.05976. With p_i = |D_i| / |D| and client i of rank r_i:

    W becomes W + (alpha/r) [p_1 B_1, p_2 B_2, ...] [A_1; A_2; ...]
    then A is drawn again and B is zero

The aggregation is exact. The method adapts the rank, and with it the bytes sent to the server, the optimizer
memory and the LoRA part of the compute. Each client runs all K experts. The stacked factors, whose rank is
the sum of all r_i, are sent to the clients from then on, and grow with every round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.messages import Adapter, ClientUpdate
from fedflame.seeds import generator
from fedflame.strategies.base import ServerState, stacked
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FLoRA(FedAvg):
    """Every client's product, weighted by its rows, becomes part of the base."""

    seed: int = 0
    """The seed from which A is drawn after each round."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        """Merge an adapter that is not zero into the base: clients of smaller rank would lose part of it."""
        state = super().initialize(adapter, tiers, num_layers)
        if not any(b.any() for b, _ in adapter.factors().values()):
            return state
        return replace(state, adapter=_drawn_anew(adapter, self.seed, adapter.rank), merged=adapter)

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        stack = stacked(state, updates, self.counted_rows)
        if not stack.rank:
            return state
        merged = state.merged.concatenate(stack)
        return replace(state, adapter=_drawn_anew(state.adapter, self.seed, merged.rank), merged=merged)


def _drawn_anew(adapter: Adapter, seed: int, merged_ranks: int) -> Adapter:
    """Draw A uniformly in +-1/sqrt(fan-in), another A for each `merged_ranks`, and set B to zero."""
    factors = {}
    for name, (b, a) in adapter.factors().items():
        bound = a.shape[-1] ** -0.5
        draw = generator(seed, "flora", merged_ranks, name)
        factors[name] = (torch.zeros_like(b), torch.empty_like(a).uniform_(-bound, bound, generator=draw))
    return Adapter.from_factors(factors)
