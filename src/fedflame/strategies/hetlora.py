"""HetLoRA: a client trains the first r_i ranks; the server averages A and B padded with zeros.

Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432. The FLAME paper calls it HLoRA. With pad() the zeros after the client's ranks:

    A = sum_i w_i pad(A_i),  B = sum_i w_i pad(B_i),  w_i = n_i / sum_j n_j
    n_i = ||B_i A_i||_F over all modules of the client

Adapts the rank: bytes, optimizer memory and the LoRA part of the compute; each client runs all K experts.
A client has one weight, not one for each module: what it learned stays together. Rows do not count. The
zeros of the padding take part in the mean, so that ranks that few clients train shrink. Ranks beyond
those of every client of the round stay as they are: with A and B at zero they would never move again.

Rank self-pruning, with gamma = `rank_decay` > 0: the client's objective has lambda ||B_>|| ||A_>|| more,
of the ranks after the first gamma r_i over all modules together. Where ||B_>|| ||A_>|| is smaller after
the training than before, r_i is gamma r_i, at least one, from the end of this round on. The server sees
that in the update and keeps r_i in its state.
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
    """Zero-padded averaging, clients weighed by the norm of their product."""

    rank_decay: float = 0.0
    """gamma; 0 for no self-pruning."""
    rank_penalty: float = 0.01
    """lambda."""

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        rank = min(client.rank, state.ranks.get(client.client, client.rank))
        told = super().configure_train(state, replace(client, rank=rank))
        kept = self._kept(rank)
        return replace(told, rank_penalty=self.rank_penalty, kept_rank=kept) if kept < rank else told

    def _kept(self, rank: int) -> int:
        """Ranks that are left of these when the client prunes itself: at least one."""
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
    """||B A||_F over all products together, from Gram matrices: ||B A||^2 = sum of (B'B) * (A A')."""
    squares = 0.0
    for b, a in adapter.factors().values():
        b, a = b.double(), a.double()
        squares += float(((b.mT @ b) * (a @ a.mT)).sum())
    return math.sqrt(max(0.0, squares))
