"""HetLoRA: a client trains the first r_i ranks; the server averages A and B padded with zeros.

Cho et al.: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432. The FLAME paper calls it HLoRA. With pad() the zeros after the client's ranks:

    A = sum_i w_i pad(A_i),  B = sum_i w_i pad(B_i),  w_i = n_i / sum_j n_j
    n_i = ||B_i A_i||_F over all modules of the client

Adapts the rank: bytes, optimizer memory and the LoRA part of the compute; each client runs all K experts.
A client has one weight, not one for each module: what it learned stays together. Rows do not count. The
zeros of the padding take part in the mean, so that ranks that few clients train shrink. Ranks beyond
those of every client of the round stay as they are: with A and B at zero they would never move again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import ServerState, WeightedMean, client_values, in_client_order
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class HetLoRA(FedAvg):
    """Zero-padded averaging, clients weighed by the norm of their product."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        means, rank = WeightedMean(), 0
        for update in in_client_order(updates):
            values = client_values(state, update)
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
        return replace(state, adapter=mean.combine(untrained, torch.add))


def product_norm(adapter: Adapter) -> float:
    """||B A||_F over all products together, from Gram matrices: ||B A||^2 = sum of (B'B) * (A A')."""
    squares = 0.0
    for b, a in adapter.factors().values():
        b, a = b.double(), a.double()
        squares += float(((b.mT @ b) * (a @ a.mT)).sum())
    return math.sqrt(max(0.0, squares))
