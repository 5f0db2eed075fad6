"""FlexLoRA: the server averages the products B A and sends each client their largest singular directions.

Bai et al.: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources, NeurIPS 2024, arXiv 2402.11505. With p_i = |D_i| / |D| and the client's rank r_i:

    sum_i p_i B_i A_i = U S V'   for each projection of each expert
    client i trains B = U S, A = V' of the first r_i singular values

The method adapts the rank, and with it the bytes, the optimizer memory and the LoRA part of the compute. Each
client runs all K experts. alpha/r is the same for all clients and cancels. The state holds the best
approximation of the run's rank; that is enough, because no client has a larger rank. The product is never
formed: QR orthogonalises the stacked factors, and the SVD is of a matrix no larger than the stack's rank (as
in HLoRA, arXiv 2503.00813).
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
    """Mean of the products, cut to each client's rank by SVD."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        stack = stacked(state, updates, self.counted_rows)
        if not stack.rank:
            return state
        # This changes no product. It adds directions to A where the clients together have fewer than r.
        stack = stack.concatenate(weighted(state.adapter, 0.0))
        return replace(state, adapter=nearest_of_rank(stack, state.adapter.rank))


def nearest_of_rank(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter of this rank with the nearest products in Frobenius norm (Eckart, Young 1936).

    B = U S and A = V', with descending singular values. The rows of A are orthonormal even where S is zero,
    so that such a rank can still learn.
    """
    return Adapter.from_factors(
        {name: _truncated_svd(*pair, rank) for name, pair in adapter.factors().items()}
    )


def _truncated_svd(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    spare = rank - s.shape[-1]  # negative: cut; positive: a matrix is narrower than the rank
    b, a = pad(q_b @ (u * s.unsqueeze(-2)), (0, spare)), pad(vt @ q_a.mT, (0, 0, 0, spare))
    return b.float(), a.float()
