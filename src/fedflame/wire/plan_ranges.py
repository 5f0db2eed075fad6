"""What a plan can ask for, so that no number in it makes a site loop for ever or take memory without end.

A site's own limits are narrower; see `trainer.limits`.
"""

from __future__ import annotations

import torch

from fedflame.errors import InvalidMessage
from fedflame.messages import Adapter, EvaluationPlan, RoundPlan, half_of

MOST_DROPOUT = 0.99
_LARGE = 1 << 31
_LARGE_FACTOR = 1e6
_DIMENSIONS = {"experts": 3, "attention": 2}


def require_possible(plan: RoundPlan | EvaluationPlan) -> None:
    """Check the numbers of a plan, and the shapes of its values as far as no model is needed.

    Raises:
        InvalidMessage: a number is out of its range, or a value is no float32 bank or matrix of its rank.
    """
    _require_values(plan)
    own = _of_training(plan) if isinstance(plan, RoundPlan) else _OF_EVALUATION
    experts = next(iter(plan.adapter.experts.values())).shape[0]
    for name, least, most in (("client", 0, _LARGE), ("active_experts", 1, experts), *own):
        value = getattr(plan, name)
        if not least <= value <= most:  # NaN is in no range
            raise InvalidMessage(f"plan with {name} = {value}; {least} to {most:g} are possible")


_OF_EVALUATION = (("round", 0, _LARGE), ("max_new_tokens", 0, _LARGE))


def _of_training(plan: RoundPlan) -> tuple[tuple[str, float, float], ...]:
    """Return the ranges of the numbers that only a plan of training has."""
    return (
        ("round", 1, _LARGE),
        ("seed", 0, 2**63 - 1),
        ("learning_rate", 0, _LARGE_FACTOR),
        ("weight_decay", 0, _LARGE_FACTOR),
        ("batch_size", 1, _LARGE),
        ("max_steps", 1, _LARGE),
        ("tokens_per_step", 0, _LARGE),
        ("gradient_accumulation_steps", 1, _LARGE),
        ("num_train_epochs", 0, _LARGE_FACTOR),
        ("warmup_rounds", 0, _LARGE),
        ("max_grad_norm", 0, _LARGE_FACTOR),
        ("packed_length", 0, _LARGE),
        ("lora_dropout", 0, MOST_DROPOUT),
        ("proximal_mu", 0, _LARGE_FACTOR),
        ("router_aux_loss_coef", 0, _LARGE_FACTOR),
        ("rank_penalty", 0, _LARGE_FACTOR),
        ("kept_rank", 0, plan.adapter.rank),
        ("clip_norm", 0, _LARGE_FACTOR),
        ("noise_multiplier", 0, _LARGE_FACTOR),
        ("target_epsilon", 0, _LARGE_FACTOR),
        ("target_delta", 0, 1),
        ("private_steps", plan.max_steps if plan.is_private else 0, _LARGE),
    )


def _require_values(plan: RoundPlan | EvaluationPlan) -> None:
    if plan.rescaler_values.dim() != 1 or plan.rescaler_values.dtype != torch.float32:
        raise InvalidMessage("plan whose rescaler_values are no float32 vector")
    for what, adapter in (("adapter", plan.adapter), ("merged", plan.merged)):
        for name, value in adapter.tensors().items():
            if value.dim() != _DIMENSIONS[name.split(".")[0]] or value.dtype != torch.float32:
                raise InvalidMessage(f"plan with {what} value {name} as {value.dtype} {tuple(value.shape)}")
        _require_one_rank(what, adapter)
    if plan.adapter.rank < 1:
        raise InvalidMessage("plan without an adapter")
    if len({bank.shape[0] for bank in plan.adapter.experts.values()}) > 1:
        raise InvalidMessage("plan whose banks differ in their number of experts")


def _require_one_rank(what: str, adapter: Adapter) -> None:
    """Every factor has the rank of A2; A1 may have it twice, for gate and up."""
    for name, value in adapter.tensors().items():
        rank = value.shape[-2] if half_of(name) == "A" else value.shape[-1]
        if rank not in (adapter.rank, 2 * adapter.rank if name.endswith(".A1") else adapter.rank):
            raise InvalidMessage(f"plan with {what} value {name} of rank {rank} beside rank {adapter.rank}")
