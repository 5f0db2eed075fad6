"""Compute what a run will cost, from the configuration, the data and the model's shape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedflame.config.run_config import RunConfig
from fedflame.config.sections import MOST_STEPS
from fedflame.config.words import GHOST_TOKENS, Dtype
from fedflame.cost.adapter_size import AdapterSize, adapter_parameters
from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.memory import MemoryEstimate, training_memory
from fedflame.cost.model_shape import ModelShape
from fedflame.cost.row_length import row_length
from fedflame.cost.scoring_cost import ScoringCost, scoring_cost
from fedflame.cost.tiers import Tier, TierCost, tier_costs


@dataclass(frozen=True)
class ClientCost:
    """The cost of one client in a round in which it trains with this k."""

    client: int
    trained_experts: int
    """The k that it trains with; the method may choose another k than the client affords."""
    trained_rank: int
    steps: int
    tokens_per_step: int
    """Tokens of its largest batch."""
    training_flops: float
    """FLOPs of forward and backward of all steps, if all batches were as large as the largest."""


@dataclass(frozen=True)
class RunCost:
    """The costs per tier and per client, the adapter size, and the sequence length behind them."""

    clients: list[ClientCost]
    """In client order. A client that trains with several k in turn has one entry per k, largest first."""
    tiers: list[TierCost]
    memory: list[MemoryEstimate]
    """For each of `tiers`, at the largest optimizer step of its clients."""
    adapter: AdapterSize
    """The size of the adapter at the run's rank."""
    merged_bytes: int
    """Bytes by which the plan of each client grows with every round, at most, also one of an evaluation."""
    scoring: ScoringCost
    """What evaluations at the clients send."""
    sequence_length: int
    """Tokens per row."""
    labelled_share: float
    """Share of the tokens that have a label; the head is applied only to these."""

    def to_json(self) -> dict[str, Any]:
        """Return the costs as plain values, as in plan.json."""
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
            "client_evaluation": asdict(self.scoring),
            "tiers": tiers,
            "clients": [asdict(client) for client in self.clients],
        }


def run_cost(
    config: RunConfig,
    shape: ModelShape,
    dtype: Dtype,
    sequence_length: int,
    labelled_share: float,
    rows: Sequence[int],
) -> RunCost:
    """Return the costs of every k and rank that clients train with, and of every other k that they afford.

    FLOPs are those of rows, also where rows share a sequence.

    Args:
        config: the configuration.
        shape: the sizes of the model.
        dtype: of the frozen base.
        sequence_length: tokens per row.
        labelled_share: share of the tokens that have a label.
        rows: of each client, in client order.

    Raises:
        UserError: a tier's k is not between 1 and the model's K, or a row is longer than its context.
    """
    training = config.training
    packed = row_length(config.data.max_length, shape) if training.packing else sequence_length
    targets, r, full = config.adapter.target_modules, config.adapter.r, shape.num_experts_per_tok

    def flops_per_token(k: int, rank: int) -> float:
        return training_flops(config, shape, k, rank, sequence_length, labelled_share)

    sequences = [math.ceil(count * sequence_length / packed) for count in rows]
    clients = _client_costs(config, full, packed, sequences, flops_per_token)
    trained = Counter((client.trained_experts, client.trained_rank) for client in clients)
    idle = set(config.evaluated_experts(full)) - {k for k, _ in trained}
    pairs = sorted([*trained, *((k, r) for k in idle)], reverse=True)
    tiers = [Tier(k, rank, trained[k, rank]) for k, rank in pairs]
    setting = (targets, sequence_length, labelled_share)
    halves = config.method.halves
    costs = tier_costs(shape, tiers, r, *setting, halves, config.communication.update_dtype)
    memory = []
    for k, rank in pairs:
        tokens = max(
            client.tokens_per_step
            for client in clients
            if (k, rank)
            in ((config.afforded_experts()[client.client], r), (client.trained_experts, client.trained_rank))
        )
        if config.privacy.unit != "none":  # its rows are computed one by one, or in batches of their own
            tokens = max(packed, GHOST_TOKENS) if config.privacy.clipping == "ghost" else packed
        masked = (tokens if training.padding_free else packed) if training.packs else 0
        dropout = config.adapter.lora_dropout > 0
        load = tokens, dtype, labelled_share, training.gradient_checkpointing, masked, dropout
        memory.append(training_memory(shape, k, rank, targets, *load))
    ranks = sorted(config.trained_ranks(full))
    merged = sum(ranks[-config.clients_per_round() :]) * config.method.merges
    return RunCost(
        clients,
        costs,
        memory,
        adapter_parameters(shape, r, targets),
        4 * adapter_parameters(shape, merged, targets).total,
        scoring_cost(config, shape),
        sequence_length,
        labelled_share,
    )


def training_flops(
    config: RunConfig, shape: ModelShape, k: int, rank: int, sequence_length: int, labelled_share: float
) -> float:
    """Return the FLOPs of forward and backward per token, with k experts and LoRA of this rank."""
    targets = config.adapter.target_modules
    return training_flops_per_token(shape, k, rank, targets, sequence_length, labelled_share).total


def within_budget(config: RunConfig, amount: float, afforded: float, spent: float) -> float:
    """Return what a client trains in a round, of the amount that is configured, under `training.budget`.

    A batch always has the client's own number of tokens, so only the cost per token matters. Under FLAME a
    round never costs more than the client affords: a round with a larger k is shorter under any budget.

    Args:
        config: the configuration, with the budget and the method.
        amount: steps or epochs.
        afforded: training FLOPs per token at the k that the client affords and the run's rank.
        spent: training FLOPs per token at the k and rank that the method gives it.
    """
    if config.training.budget == "steps" and not (config.method.experts == "in_turn" and spent > afforded):
        return amount
    return amount * afforded / spent


def local_steps(config: RunConfig, batches: int, afforded: float, spent: float) -> int:
    """Return a client's optimizer steps per round under `training.budget`; at least one.

    Args:
        config: the configuration, with the budget, `max_steps` or `num_train_epochs`, and the method.
        batches: of an epoch of the client.
        afforded: see `within_budget`.
        spent: see `within_budget`.
    """
    training = config.training
    if not training.num_train_epochs:
        return max(1, round(within_budget(config, training.max_steps, afforded, spent)))
    epochs = within_budget(config, training.num_train_epochs, afforded, spent)
    return steps_of_epochs(epochs, batches, training.gradient_accumulation_steps)


def steps_of_epochs(epochs: float, batches: int, gradient_accumulation_steps: int) -> int:
    """Return the optimizer steps of so many epochs of so many batches; at least one, at most `MOST_STEPS`."""
    steps = math.ceil(math.ceil(epochs * batches) / gradient_accumulation_steps)
    return min(max(1, steps), MOST_STEPS)


def _client_costs(
    config: RunConfig,
    full: int,
    longest: int,
    sequences: Sequence[int],
    flops_per_token: Callable[[int, int], float],
) -> list[ClientCost]:
    """Return the costs of each client, which has so many `sequences` of at most `longest` tokens."""
    by_sequences = longest * config.training.per_device_train_batch_size
    of_a_step = config.training.gradient_accumulation_steps
    rounds = range(1, config.server.num_server_rounds + 1)
    by_round = [config.trained_experts(full, round_number) for round_number in rounds]
    costs = []
    for client, (affords, rank, budget) in enumerate(
        zip(config.afforded_experts(), config.trained_ranks(full), config.tokens_per_step(), strict=True)
    ):
        tokens = max(budget, longest) if budget else by_sequences
        afforded = flops_per_token(affords, config.adapter.r)
        for k in sorted({trained[client] for trained in by_round}, reverse=True):
            spent = flops_per_token(k, rank)
            batches = math.ceil(sequences[client] / max(1, tokens // longest))
            steps = local_steps(config, batches, afforded, spent)
            costs.append(ClientCost(client, k, rank, steps, tokens, steps * of_a_step * tokens * spent))
    return costs
