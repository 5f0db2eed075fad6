"""What a run will cost, from the configuration, the data and the model's shape; no weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fedflame.budgets import (
    AdapterSize,
    MemoryEstimate,
    ModelShape,
    Tier,
    TierCost,
    adapter_parameters,
    tier_costs,
    training_memory,
)
from fedflame.config import MERGING_METHODS, TRAINED_HALVES, RunConfig


@dataclass(frozen=True)
class RunCost:
    """Costs per tier, adapter size, and the sequence they are for."""

    tiers: list[TierCost]
    memory: list[MemoryEstimate]
    """Per tier, in the order of `tiers`."""
    adapter: AdapterSize
    """At the run's rank."""
    merged_bytes: int
    """By so much every round makes the next one's bytes down to each client grow, at most."""
    sequence_length: int
    """Tokens per row."""
    labelled_share: float
    """Share of the tokens at which the head runs."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in plan.json."""
        tiers = [
            asdict(tier) | {"training_memory_bytes": memory.total}
            for tier, memory in zip(self.tiers, self.memory, strict=True)
        ]
        return {
            "sequence_length": self.sequence_length,
            "labelled_share": self.labelled_share,
            "adapter_parameters": self.adapter.total,
            "adapter_bytes": self.adapter.bytes_down,
            "merged_bytes_per_round": self.merged_bytes,
            "tiers": tiers,
        }


def run_cost(
    config: RunConfig,
    shape: ModelShape,
    dtype: Literal["float32", "bfloat16"],
    sequence_length: int,
    labelled_share: float,
) -> RunCost:
    """Costs of every k and rank that a client trains with, then of every other k that a client affords.

    Raises:
        UserError: a tier's k is 0 or above the model's own.
    """
    targets, r, full = config.adapter.attention_modules(), config.adapter.r, shape.num_experts_per_tok
    ranks = config.trained_ranks(full)
    trained = Counter(zip(config.trained_experts(full), ranks, strict=True))
    idle = set(config.evaluated_experts(full)) - {k for k, _ in trained}
    rows = sorted([*trained, *((k, r) for k in idle)], reverse=True)
    tiers = [Tier(k, rank, trained[k, rank]) for k, rank in rows]
    setting = (targets, sequence_length, labelled_share)
    costs = tier_costs(shape, tiers, r, *setting, TRAINED_HALVES.get(config.strategy.name, ("both",)))
    tokens = sequence_length * config.training.per_device_train_batch_size
    memory = [
        training_memory(shape, cost.active_experts, cost.rank, targets, tokens, dtype, labelled_share)
        for cost in costs
    ]
    merged = sum(sorted(ranks)[-config.clients_per_round() :]) * (config.strategy.name in MERGING_METHODS)
    return RunCost(
        costs,
        memory,
        adapter_parameters(shape, r, targets),
        4 * adapter_parameters(shape, merged, targets).total,
        sequence_length,
        labelled_share,
    )
