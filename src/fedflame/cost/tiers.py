"""Compute the cost of each client of a tier: FLOPs per token and bytes per round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from fedflame.config.words import Trainable, UpdateDtype
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.flops import forward_flops_per_token, training_flops_per_token
from fedflame.cost.model_shape import ModelShape
from fedflame.errors import UserError


@dataclass(frozen=True)
class Tier:
    """The clients that train with the same number of active experts and the same rank."""

    active_experts: int
    rank: int
    clients: int


@dataclass(frozen=True)
class TierCost:
    """The cost of each client of a tier: FLOPs per token and bytes per round."""

    active_experts: int
    rank: int
    """Rank of the LoRA that is received, trained and sent."""
    clients: int
    forward_flops_per_token: float
    relative_to_full: float
    """Forward FLOPs relative to those at the model's K and the run's rank."""
    training_flops_per_token: float
    bytes_down: int
    bytes_up: int


def require_rank(r: int, shape: ModelShape) -> None:
    """Raise UserError if a LoRA rank is larger than what a product of an expert's matrices can have."""
    smaller = min(shape.expert_hidden_size, shape.expert_size)
    if r > smaller:
        raise UserError(
            f"adapter.r = {r}: must be at most {smaller}, the smaller side of an expert's matrices"
        )


def require_possible(experts: Iterable[int], shape: ModelShape) -> None:
    """Raise UserError if a number of active experts is not between 1 and the model's K."""
    full = shape.num_experts_per_tok
    for k in experts:
        if not 1 <= k <= full:
            raise UserError(
                f"active_experts {k}: must be between 1 and {full} (the model's num_experts_per_tok)"
            )


def tier_costs(
    shape: ModelShape,
    tiers: Sequence[Tier],
    r: int,
    target_modules: Collection[str],
    sequence_length: int,
    labelled_share: float = 1.0,
    halves: Sequence[Trainable] = ("both",),
    update_dtype: UpdateDtype = "float32",
) -> list[TierCost]:
    """Return one cost per tier, in the given order.

    Args:
        shape: the sizes of the model.
        tiers: k, rank and number of clients of each tier.
        r: rank of the run, the reference of `relative_to_full`.
        target_modules: attention projections with LoRA.
        sequence_length: tokens per sequence.
        labelled_share: share of the tokens that have a label.
        halves: the halves of the adapter that the method trains and sends in turn. The larger one counts for
            bytes; FLOPs are those of both.
        update_dtype: the dtype of updates.

    Raises:
        UserError: a tier's k is not between 1 and the model's K, or a target module is unknown.
    """
    require_possible([tier.active_experts for tier in tiers], shape)
    setting = (target_modules, sequence_length, labelled_share)
    full = forward_flops_per_token(shape, shape.num_experts_per_tok, r, *setting).total
    costs = []
    for tier in tiers:
        sizes = [adapter_parameters(shape, tier.rank, target_modules, half) for half in halves]
        forward = forward_flops_per_token(shape, tier.active_experts, tier.rank, *setting).total
        training = training_flops_per_token(shape, tier.active_experts, tier.rank, *setting).total
        costs.append(
            TierCost(
                active_experts=tier.active_experts,
                rank=tier.rank,
                clients=tier.clients,
                forward_flops_per_token=forward,
                relative_to_full=forward / full,
                training_flops_per_token=training,
                bytes_down=adapter_parameters(shape, tier.rank, target_modules).bytes_down,
                bytes_up=max(size.bytes_up(update_dtype) for size in sizes),
            )
        )
    return costs
