"""What a site allows: its file's limits, held against a plan, its memory, its time and its update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedflame.base.device import DeviceChoice
from fedflame.base.memory_limit import is_short_of_memory, memory_limit
from fedflame.config.words import Checkpointed
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.memory import (
    base_bytes,
    held_base_bytes,
    least_evaluation_memory,
    least_training_memory,
    training_memory,
)
from fedflame.cost.model_shape import ModelShape
from fedflame.data.encoding import EncodedRow
from fedflame.messages import ClientUpdate, EvaluationPlan, RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import Site, SiteLimits


def require_allowed(site: Site, job: TrainingJob, plan: RoundPlan) -> None:
    """Raise Refusal if the site's file does not allow the numbers of a job or of its plan."""
    limits, tokens = site.limits, plan.most_tokens(plan.max_steps, job.max_length)
    _require_allowed(site, job, plan, (("steps", plan.max_steps, limits.max_steps),), tokens)
    rows = plan.most_tokens(plan.max_steps, 1)  # of one token each
    _require_least("rows", rows, limits.min_rows_per_update)


def require_scoring_allowed(site: Site, job: TrainingJob, plan: EvaluationPlan, rows: int) -> None:
    """Raise Refusal if the site's file does not allow to score so many rows by this job and plan."""
    _require_allowed(site, job, plan, (), most_scored_tokens(job, plan, rows))


def most_scored_tokens(job: TrainingJob, plan: EvaluationPlan, rows: int) -> int:
    """Return the most tokens that pass through the model: each row, and each prompt with its answer."""
    passes = 2 if plan.max_new_tokens else 1
    return rows * (passes * job.max_length + plan.max_new_tokens)


def _require_allowed(
    site: Site,
    job: TrainingJob,
    plan: RoundPlan | EvaluationPlan,
    own: Sequence[tuple[str, int, int]],
    tokens: int,
) -> None:
    limits = site.limits
    if job.model_name_or_path not in site.models:
        allowed = ", ".join(site.models)
        raise Refusal(f"model {job.model_name_or_path!r} is not allowed here; {allowed} may be trained")
    if plan.adapter.rank > job.r:
        raise Refusal(f"the plan has rank {plan.adapter.rank}; its job says r = {job.r}")
    for what, asked, most in (
        ("k", plan.active_experts, site.most_experts),
        ("rank", job.r, limits.max_rank),
        ("rounds", job.num_server_rounds, limits.max_rounds),
        ("round", plan.round, limits.max_rounds),
        *own,
        ("tokens", tokens, limits.max_tokens),
    ):
        if asked > most:
            raise Refusal(f"the plan asks for {what} = {asked:,}; this site allows at most {most:,}")


def require_enough(limits: SiteLimits, update: ClientUpdate) -> None:
    """Raise Refusal if an update tells too much of single rows, because it is of few rows or tokens."""
    _require_least("rows", update.trained_examples, limits.min_rows_per_update)
    _require_least("tokens", update.tokens, limits.min_tokens_per_update)


def require_enough_scored(limits: SiteLimits, rows: int, response_tokens: int) -> None:
    """Raise Refusal if a score tells too much of single rows, because it is of few rows or tokens."""
    _require_least("rows", rows, limits.min_rows_per_update, "score")
    _require_least("tokens", response_tokens, limits.min_tokens_per_update, "score")


def _require_least(what: str, found: int, least: int, of: str = "update") -> None:
    if found < least:
        raise Refusal(f"the {of} would be of {found:,} {what}; this site asks for at least {least:,}")


def require_flops(limits: SiteLimits, flops: Callable[[], float]) -> None:
    """Raise Refusal if the work of a plan, which is counted only if there is a limit, exceeds it."""
    if limits.max_flops and (asked := flops()) > limits.max_flops:
        raise Refusal(f"the plan asks for {asked:.3g} FLOPs; this site allows at most {limits.max_flops:.3g}")


def require_memory(limits: SiteLimits, device: DeviceChoice, needed: int) -> None:
    """Raise Refusal if a round takes more bytes than `max_memory` or, on a CPU, than there are.

    A full memory of a card is an error that the trainer survives; that of a machine ends its processes.
    """
    most = limits.max_memory * 1e9 or (math.inf if device.cards else memory_limit())
    if needed > most:
        raise Refusal(
            f"the plan takes {needed / 1e9:.3g} GB of memory; this site allows at most {most / 1e9:.3g} GB"
        )


def memory_needed(
    shape: ModelShape,
    job: TrainingJob,
    plan: RoundPlan,
    batch_tokens: int,
    checkpointing: Checkpointed,
    device: DeviceChoice,
) -> int:
    """Return the bytes that a round takes with so many tokens in its largest batch.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    targets = job.adapter.target_modules
    setting = (shape, plan.active_experts, job.r, targets, batch_tokens, job.dtype)
    masked = min(batch_tokens, plan.longest_sequence(job.max_length)) if plan.packs else 0
    estimate = training_memory(
        *setting,
        gradient_checkpointing=checkpointing,
        mask_width=masked,
        lora_dropout=plan.lora_dropout > 0,
    )
    merged = 4 * adapter_parameters(shape, plan.merged.rank, targets).total
    least = least_training_memory(shape, job.r, targets, job.dtype, plan.holds_gradients)
    needed = least + estimate.activations + merged
    mapped = not device.cards and is_short_of_memory(base_bytes(shape, job.dtype))
    return needed - estimate.base if mapped else needed


def scoring_memory_needed(
    shape: ModelShape, job: TrainingJob, plan: EvaluationPlan, device: DeviceChoice
) -> int:
    """Return the bytes that an evaluation takes at least: base, adapter and merged factors.

    Raises:
        UserError: a target module is no attention projection of the model.
    """
    targets = job.adapter.target_modules
    merged = 4 * adapter_parameters(shape, plan.merged.rank, targets).total
    needed = least_evaluation_memory(shape, job.r, targets, job.dtype) + merged
    mapped = not device.cards and is_short_of_memory(base_bytes(shape, job.dtype))
    return needed - held_base_bytes(shape, job.r, job.dtype) if mapped else needed


def largest_batch(plan: RoundPlan, rows: Sequence[EncodedRow]) -> int:
    """Return the most tokens that a batch of the plan can have on these rows, with padding."""
    lengths = [len(row.ids) for row in rows]
    longest, every = max(lengths), sum(lengths)
    packed = replace(plan, packed_length=min(plan.packed_length, every))
    of_rows = every if plan.padding_free else len(rows) * max(packed.packed_length, longest)
    return min(packed.largest_batch(longest), of_rows)


def time_limit(limits: SiteLimits) -> Callable[[int], None]:
    """Return what is called after every batch. It raises Refusal once the round's time is over."""
    start, most = time.monotonic(), limits.max_seconds_per_round

    def on_step(tokens: int) -> None:
        if most and time.monotonic() - start > most:
            raise Refusal(f"the round takes longer than the {most:g} s that this site allows")

    return on_step
