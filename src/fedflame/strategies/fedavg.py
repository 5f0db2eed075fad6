"""FedAvg, on LoRA FedIT: one k and one rank for every client, A and B each averaged by rows.

McMahan et al.: Communication-Efficient Learning of Deep Networks from Decentralized Data,
arXiv 1602.05629; on LoRA: Zhang et al., Towards Building the Federated GPT: Federated Instruction
Tuning, arXiv 2305.05644. With p_i = |D_i| / |D|:

    A = sum_i p_i A_i,  B = sum_i p_i B_i

Adapts nothing. With k or r = the smallest client's it is the trivial baseline of the FLAME paper; with
k = K and r = R it is the bound that no unequal federation can afford. The product of the means is not
the mean of the products: `fedex_lora`, `ffa_lora` and `rolora` are ways to make it that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from fedflame.config.words import CountedRows
from fedflame.messages import Adapter, ClientUpdate
from fedflame.strategies.base import (
    ClientProfile,
    ServerState,
    TrainInstructions,
    WeightedMean,
    apply_delta,
    client_weight,
    in_client_order,
)


@dataclass(frozen=True)
class FedAvg:
    """Plain weighted averaging at one k for all, without a rescaler."""

    active_experts: int
    """Experts per token on every client (k)."""
    rank: int | None = None
    """LoRA rank on every client; None for what each affords. Ranks that nobody trains stay as they are."""
    counted_rows: CountedRows = "held"
    """What |D_i| is: all rows of a client, or those it trained on in the round."""

    def initialize(self, adapter: Adapter, tiers: Iterable[int], num_layers: int) -> ServerState:
        return ServerState(adapter, {k: torch.ones(num_layers) for k in {*tiers, self.active_experts}})

    def configure_train(self, state: ServerState, client: ClientProfile) -> TrainInstructions:
        adapter = state.adapter.with_rank(self.rank or client.rank)
        rescaler_values = state.rescalers[self.active_experts]
        return TrainInstructions(self.active_experts, adapter, "fixed", rescaler_values, state.trainable)

    def aggregate_train(self, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
        means = WeightedMean()
        for update in in_client_order(updates):
            for name, delta in update.delta.with_rank(state.adapter.rank).tensors().items():
                means.add(name, delta, client_weight(update, self.counted_rows))
        if not means.names():
            return state
        mean = Adapter.from_tensors({name: means.mean(name) for name in means.names()})
        return replace(state, adapter=state.adapter.combine(mean, apply_delta))
