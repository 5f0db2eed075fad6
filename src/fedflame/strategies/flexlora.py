"""FlexLoRA: the server averages the products B A and hands out their largest singular directions.

Bai et al.: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources, NeurIPS 2024, arXiv 2402.11505. With p_i = |D_i| / |D| and the client's rank r_i:

    sum_i p_i B_i A_i = U S V'   for each projection of each expert
    client i trains B = U S, A = V' of the first r_i singular values

Adapts the rank: bytes, optimizer memory and the LoRA part of the compute; each client runs all K experts.
alpha/r is the same for all and cancels. The state holds the best approximation of the run's rank, which
loses nothing that a client is given, since none has more. No product is formed: the factors stacked are
orthogonalised by QR, and the SVD is that of a matrix as small as the stack's rank (as in HLoRA,
arXiv 2503.00813).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import ServerState, stacked, weighted
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FlexLoRA(FedAvg):
    """Mean of the products, redistributed by SVD."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        stack = stacked(state, updates, self.counted_rows)
        if not stack.rank:
            return state
        # Adds nothing to the product, but directions for A where the clients have fewer than r.
        stack = stack.concatenate(weighted(state.adapter, 0.0))
        return replace(state, adapter=nearest_of_rank(stack, state.adapter.rank))


def nearest_of_rank(adapter: Adapter, rank: int) -> Adapter:
    """The adapter of this rank whose products are nearest in Frobenius norm (Eckart, Young 1936).

    Its B = U S and A = V', singular values falling: the rows of A are orthonormal also where S is zero,
    so that such a rank can learn.
    """
    return Adapter.from_factors(
        {name: _truncated_svd(*pair, rank) for name, pair in adapter.factors().items()}
    )


def _truncated_svd(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    spare = rank - s.shape[-1]  # below zero it cuts; above it where a matrix is narrower than the rank
    b, a = pad(q_b @ (u * s.unsqueeze(-2)), (0, spare)), pad(vt @ q_a.mT, (0, 0, 0, spare))
    return b.float(), a.float()
