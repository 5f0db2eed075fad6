"""FedEx-LoRA: A and B are averaged, and the error of this average is added to the frozen base.

Singhal et al.: FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models, ACL 2025, arXiv 2410.09432. With p_i = |D_i| / |D|:

    A = sum_i p_i A_i,  B = sum_i p_i B_i
    W becomes W + (alpha/r) R,  R = sum_i p_i B_i A_i - B A = sum_i p_i (B_i - B) (A_i - A)

The aggregation is exact. It does not adapt to unequal clients. We compute the right-hand form of R: it stays
in low-rank factors (r ranks per client) and avoids the cancellation of the left-hand form. These factors are
sent to the clients from then on, and grow with every round. The paper gives all clients the same weight; here
the weight is the number of rows, as in FedAvg.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import ServerState, client_weight, weighted
from fedflame.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedExLoRA(FedAvg):
    """FedAvg of A and B, with the error of the averaged product added to the base."""

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        received = list(updates)
        averaged = super().aggregate_train(state, received)
        if averaged is state:
            return state
        mean = averaged.adapter.combine(state.adapter, torch.sub)
        rows = [client_weight(update, self.counted_rows) for update in received]
        residue = [
            weighted(_less(update.delta, mean), count / sum(rows))
            for update, count in zip(received, rows, strict=True)
        ]
        return replace(averaged, merged=state.merged.concatenate(*residue))


def _less(delta: Adapter, mean: Adapter) -> Adapter:
    """Return B_i - B and A_i - A for the ranks that the client trained."""
    return delta.combine(mean.with_rank(delta.rank), torch.sub)
