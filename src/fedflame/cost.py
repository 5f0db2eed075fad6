"""What a run will cost, from the configuration, the data and the model's shape; no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedflame.budgets import (
    AdapterSize,
    MemoryEstimate,
    ModelShape,
    TierCost,
    adapter_parameters,
    count_tiers,
    tier_costs,
    training_memory,
)
from fedflame.config import RunConfig


@dataclass(frozen=True)
class RunCost:
    """Costs per tier, adapter size, and the sequence they are for."""

    tiers: list[TierCost]
    memory: list[MemoryEstimate]
    """Per tier, in the order of `tiers`."""
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
    dtype: Literal["float32", "bfloat16"],
    sequence_length: int,
    labelled_share: float,
) -> RunCost:
    """Costs of every tier of the configuration on a model of this shape.

    Raises:
        UserError: a tier's k is 0 or above the model's own.
    """
    targets, r = target_modules(config), config.adapter.r
    costs = tier_costs(shape, count_tiers(config.tiers()), r, targets, sequence_length, labelled_share)
    tokens = sequence_length * config.training.per_device_train_batch_size
    memory = [
        training_memory(shape, cost.active_experts, r, targets, tokens, dtype, labelled_share)
        for cost in costs
    ]
    return RunCost(costs, memory, adapter_parameters(shape, r, targets), sequence_length, labelled_share)


def target_modules(config: RunConfig) -> Sequence[str]:
    """The attention projections with LoRA."""
    return [name.strip() for name in config.adapter.target_modules.split(",") if name.strip()]


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer, so that rows can be measured in tokens."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
