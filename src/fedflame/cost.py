"""What a run will cost, from the configuration, the data and the model's shape; no weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fedflame.budgets import (
    AdapterSize,
    Dtype,
    MemoryEstimate,
    ModelShape,
    Tier,
    TierCost,
    adapter_parameters,
    tier_costs,
    training_memory,
)
from fedflame.config import RunConfig


@dataclass(frozen=True)
class RunCost:
    """Costs per tier, adapter size, and the sequence they are for."""

    tiers: list[TierCost]
    memory: list[MemoryEstimate]
    """Per tier, in the order of `tiers`, at the largest optimizer step of the tier's clients."""
    adapter: AdapterSize
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
            "tiers": tiers,
        }


def run_cost(
    config: RunConfig,
    shape: ModelShape,
    dtype: Dtype,
    sequence_length: int,
    labelled_share: float,
) -> RunCost:
    """Costs of every k that a client affords or trains with, on a model of this shape.

    Raises:
        UserError: a tier's k is 0 or above the model's own.
    """
    targets, r = config.adapter.attention_modules(), config.adapter.r
    trained = config.trained_experts()
    tiers = [Tier(k, trained.count(k)) for k in config.evaluated_experts()]
    costs = tier_costs(shape, tiers, r, targets, sequence_length, labelled_share)
    steps = list(zip(config.tiers(), trained, tokens_per_step(config, sequence_length), strict=True))
    memory = []
    for k in config.evaluated_experts():
        tokens = max(tokens for affords, trains, tokens in steps if k in (affords, trains))
        memory.append(training_memory(shape, k, r, targets, tokens, dtype, labelled_share))
    return RunCost(costs, memory, adapter_parameters(shape, r, targets), sequence_length, labelled_share)


def tokens_per_step(config: RunConfig, sequence_length: int) -> list[int]:
    """Tokens of each client's largest optimizer step, with rows of `sequence_length`; at least one row."""
    by_rows = sequence_length * config.training.per_device_train_batch_size
    return [max(tokens, sequence_length) if tokens else by_rows for tokens in config.tokens_per_step()]
