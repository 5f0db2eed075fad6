"""HetLoRA: client i trains the first r_i ranks; the server pads A and B with zeros and averages them.

Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432. The FLAME paper calls it HLoRA. pad() adds zeros after the client's ranks:

    A = sum_i w_i pad(A_i),  B = sum_i w_i pad(B_i),  w_i = n_i / sum_j n_j
    n_i = ||B_i A_i||_F over all modules of the client

The method adapts the rank, and with it the bytes, the optimizer memory and the LoRA part of the compute. Each
client runs all K experts. A client has one weight for all its modules, and its rows do not count. The padding
zeros are part of the mean, so ranks that few clients train shrink. Ranks that no client of the round trains
keep their values: with A and B at zero they would never change again.

Rank self-pruning, with gamma = `rank_decay` > 0: lambda ||B_>|| ||A_>|| is added to the client's objective.
B_> and A_> are the ranks after the first gamma r_i, over all modules together. If ||B_>|| ||A_>|| is smaller
after training than before, the client's rank becomes gamma r_i (at least one) at the end of the round. The
server computes this from the update and keeps the rank in its state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import (
    ClientProfile,
    ServerState,
    TrainInstructions,
    WeightedMean,
    client_values,
    in_client_order,
)
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class HetLoRA(FedAvg):
    """Zero-padded averaging; the norm of its product is a client's weight."""

    rank_decay: float = 0.0
    """gamma; 0 means no self-pruning."""
    rank_penalty: float = 0.01
    """lambda, the strength of the self-pruning penalty."""

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        rank = min(client.rank, state.ranks.get(client.client, client.rank))
        told = super().configure_train(state, replace(client, rank=rank))
        kept = self._kept(rank)
        return replace(told, rank_penalty=self.rank_penalty, kept_rank=kept) if kept < rank else told

    def _kept(self, rank: int) -> int:
        """Return the rank that remains when a client of this rank prunes itself: at least one."""
        return max(1, int(self.rank_decay * rank)) if self.rank_decay else rank

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        means, rank, ranks = WeightedMean(), 0, dict(state.ranks)
        for update in in_client_order(updates):
            values = client_values(state, update)
            kept, given = self._kept(values.rank), state.adapter.with_rank(values.rank)
            if math.prod(values.tail_norms(kept)) < math.prod(given.tail_norms(kept)):
                ranks[update.client], values = kept, values.with_rank(kept)
            norm = product_norm(values)
            if norm > 0:
                rank = max(rank, values.rank)
                for name, value in values.with_rank(state.adapter.rank).tensors().items():
                    means.add(name, value, norm)
        if not means.names():
            return state
        mean = Adapter.from_tensors({name: means.mean(name) for name in means.names()})
        trained = state.adapter.with_rank(rank).with_rank(state.adapter.rank)
        untrained = state.adapter.combine(trained, torch.sub)
        return replace(state, adapter=mean.combine(untrained, torch.add), ranks=ranks)


def product_norm(adapter: Adapter) -> float:
    """Return ||B A||_F over all modules together, from Gram matrices: ||B A||^2 = sum of (B'B) * (A A')."""
    squares = 0.0
    for b, a in adapter.factors().values():
        b, a = b.double(), a.double()
        squares += float(((b.mT @ b) * (a @ a.mT)).sum())
    return math.sqrt(max(0.0, squares))
