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
from fedflame.config import RunConfig, TrainingConfig


@dataclass(frozen=True)
class ClientCost:
    """What one client does in a round."""

    client: int
    trained_experts: int
    """The k it trains with, which the method may set apart from what it affords."""
    steps: int
    tokens_per_step: int
    """Of its largest optimizer step."""
    training_flops: float
    """Forward and backward of all steps, were each of them the largest."""


@dataclass(frozen=True)
class RunCost:
    """Costs per tier and client, adapter size, and the sequence they are for."""

    clients: list[ClientCost]
    """In client order."""
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
            "clients": [asdict(client) for client in self.clients],
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
    clients = _client_costs(config, costs, sequence_length)
    memory = []
    for k in config.evaluated_experts():
        steps = zip(config.tiers(), clients, strict=True)
        tokens = max(c.tokens_per_step for affords, c in steps if k in (affords, c.trained_experts))
        memory.append(training_memory(shape, k, r, targets, tokens, dtype, labelled_share))
    size = adapter_parameters(shape, r, targets)
    return RunCost(clients, costs, memory, size, sequence_length, labelled_share)


def local_steps(training: TrainingConfig, afforded: float, spent: float) -> int:
    """A client's optimizer steps per round under `training.budget`; at least one.

    A step has the client's own number of tokens whatever it trains, so that costs per token decide.

    Args:
        training: has the budget and `max_steps`.
        afforded: training FLOPs per token at the k that the client affords and the run's rank.
        spent: training FLOPs per token at the k and rank that the method gives it.
    """
    if training.budget == "steps":
        return training.max_steps
    return max(1, round(training.max_steps * afforded / spent))


def _client_costs(config: RunConfig, tiers: list[TierCost], sequence_length: int) -> list[ClientCost]:
    flops = {tier.active_experts: tier.training_flops_per_token for tier in tiers}
    by_rows = sequence_length * config.training.per_device_train_batch_size
    settings = zip(config.tiers(), config.trained_experts(), config.tokens_per_step(), strict=True)
    costs = []
    for client, (affords, trains, budget) in enumerate(settings):
        tokens = max(budget, sequence_length) if budget else by_rows
        steps = local_steps(config.training, flops[affords], flops[trains])
        costs.append(ClientCost(client, trains, steps, tokens, steps * tokens * flops[trains]))
    return costs
