"""What a run will cost, from the configuration, the data and the model's shape; no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fedflame.config.run_config import RunConfig
from fedflame.config.words import Dtype
from fedflame.cost.adapter_size import AdapterSize, adapter_parameters
from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.memory import MemoryEstimate, training_memory
from fedflame.cost.model_shape import ModelShape
from fedflame.cost.tiers import Tier, TierCost, tier_costs


@dataclass(frozen=True)
class ClientCost:
    """What one client does in a round in which it trains with this k."""

    client: int
    trained_experts: int
    """The k it trains with, which the method may set apart from what it affords."""
    trained_rank: int
    steps: int
    tokens_per_step: int
    """Of its largest optimizer step."""
    training_flops: float
    """Forward and backward of all steps, were each of them the largest."""


@dataclass(frozen=True)
class RunCost:
    """Costs per tier and client, adapter size, and the sequence they are for."""

    clients: list[ClientCost]
    """In client order; of a client that takes turns one for each k, largest first."""
    tiers: list[TierCost]
    memory: list[MemoryEstimate]
    """Per tier, in the order of `tiers`, at the largest optimizer step of the tier's clients."""
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
            "clients": [asdict(client) for client in self.clients],
        }


def run_cost(
    config: RunConfig,
    shape: ModelShape,
    dtype: Dtype,
    sequence_length: int,
    labelled_share: float,
) -> RunCost:
    """Costs of every k and rank that a client trains with, then of every other k that a client affords.

    Raises:
        UserError: a tier's k is 0 or above the model's own.
    """
    checkpointed = config.training.gradient_checkpointing
    targets, r, full = config.adapter.target_modules, config.adapter.r, shape.num_experts_per_tok

    def flops_per_token(k: int, rank: int) -> float:
        return training_flops(config, shape, k, rank, sequence_length, labelled_share)

    clients = _client_costs(config, full, sequence_length, flops_per_token)
    trained = Counter((client.trained_experts, client.trained_rank) for client in clients)
    idle = set(config.evaluated_experts(full)) - {k for k, _ in trained}
    rows = sorted([*trained, *((k, r) for k in idle)], reverse=True)
    tiers = [Tier(k, rank, trained[k, rank]) for k, rank in rows]
    setting = (targets, sequence_length, labelled_share)
    halves = config.method.halves
    costs = tier_costs(shape, tiers, r, *setting, halves, config.communication.update_dtype)
    memory = []
    for k, rank in rows:
        tokens = max(
            client.tokens_per_step
            for client in clients
            if (k, rank)
            in ((config.afforded_experts()[client.client], r), (client.trained_experts, client.trained_rank))
        )
        memory.append(training_memory(shape, k, rank, targets, tokens, dtype, labelled_share, checkpointed))
    ranks = sorted(config.trained_ranks(full))
    merged = sum(ranks[-config.clients_per_round() :]) * config.method.merges
    return RunCost(
        clients,
        costs,
        memory,
        adapter_parameters(shape, r, targets),
        4 * adapter_parameters(shape, merged, targets).total,
        sequence_length,
        labelled_share,
    )


def training_flops(
    config: RunConfig, shape: ModelShape, k: int, rank: int, sequence_length: int, labelled_share: float
) -> float:
    """FLOPs of forward and backward per token with k experts, and LoRA of this rank where the run has it."""
    targets = config.adapter.target_modules
    return training_flops_per_token(shape, k, rank, targets, sequence_length, labelled_share).total


def local_steps(config: RunConfig, afforded: float, spent: float) -> int:
    """A client's optimizer steps per round under `training.budget`; at least one.

    A step has the client's own number of tokens whatever it trains, so that costs per token decide. Under
    FLAME no round costs more than the client affords: a turn with a larger k has fewer steps in any case.

    Args:
        config: has the budget, `max_steps` and the method.
        afforded: training FLOPs per token at the k that the client affords and the run's rank.
        spent: training FLOPs per token at the k and rank that the method gives it.
    """
    training = config.training
    if training.budget == "steps" and not (config.method.experts == "in_turn" and spent > afforded):
        return training.max_steps
    return max(1, round(training.max_steps * afforded / spent))


def _client_costs(
    config: RunConfig, full: int, sequence_length: int, flops_per_token: Callable[[int, int], float]
) -> list[ClientCost]:
    by_rows = sequence_length * config.training.per_device_train_batch_size
    rounds = range(1, config.server.num_server_rounds + 1)
    by_round = [config.trained_experts(full, round_number) for round_number in rounds]
    costs = []
    for client, (affords, rank, budget) in enumerate(
        zip(config.afforded_experts(), config.trained_ranks(full), config.tokens_per_step(), strict=True)
    ):
        tokens = max(budget, sequence_length) if budget else by_rows
        afforded = flops_per_token(affords, config.adapter.r)
        for k in sorted({trained[client] for trained in by_round}, reverse=True):
            spent = flops_per_token(k, rank)
            steps = local_steps(config, afforded, spent)
            costs.append(ClientCost(client, k, rank, steps, tokens, steps * tokens * spent))
    return costs
