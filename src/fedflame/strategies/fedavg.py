"""FedAvg, with LoRA also called FedIT: one k and one rank for all clients; A and B are averaged by rows.

McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data,
arXiv 1602.05629; with LoRA: Zhang et al., Towards Building the Federated GPT: Federated Instruction
Tuning, arXiv 2305.05644. With p_i = |D_i| / |D|:

    A = sum_i p_i A_i,  B = sum_i p_i B_i

The method does not adapt to unequal clients. With the k or r of the smallest client it is the trivial
baseline of the FLAME paper. With k = K and r = R it is an upper bound, which unequal clients cannot afford.
The product of the mean factors is not the mean of the products; `fedex_lora`, `ffa_lora` and `rolora` avoid
this error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.config.words import CountedRows, RobustRule
from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import (
    ClientProfile,
    ServerState,
    TrainInstructions,
    apply_delta,
    client_weight,
    in_client_order,
)
from fedflame.strategies.robust import mean_by


@dataclass(frozen=True)
class FedAvg:
    """Weighted average of A and B, with one k for all clients and without a rescaler."""

    active_experts: int
    """Experts per token on every client (k)."""
    rank: int | None = None
    """LoRA rank on every client; None: each client's own. Ranks that no client trains keep their values."""
    counted_rows: CountedRows = "held"
    """What |D_i| counts: all rows of a client, or the rows that it trained on in the round."""
    robust: RobustRule = "none"
    """How values are averaged. Methods that build on this one and stack factors leave it at `none`."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        return ServerState(adapter, {k: torch.ones(num_layers) for k in {*tiers, self.active_experts}})

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        adapter = state.adapter.with_rank(self.rank or client.rank)
        rescaler_values = state.rescalers[self.active_experts]
        return TrainInstructions(self.active_experts, adapter, "fixed", rescaler_values, state.trainable)

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        means = mean_by(self.robust)
        for update in in_client_order(updates):
            for name, delta in update.delta.with_rank(state.adapter.rank).tensors().items():
                means.add(name, delta, client_weight(update, self.counted_rows))
        if not means.names():
            return state
        mean = Adapter.from_tensors({name: means.mean(name) for name in means.names()})
        return replace(state, adapter=state.adapter.combine(mean, apply_delta))
