"""What the server believes of an update: whether it can answer its plan, and how much it may weigh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median_low

import torch
from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import ClientEvaluation, ClientUpdate, EvaluationPlan, RoundPlan


def validate_update(update: ClientUpdate, plan: RoundPlan, max_length: int) -> None:
    """Check an update before it is aggregated.

    Args:
        update: the decoded update.
        plan: the plan that it answers.
        max_length: the most tokens of a row.

    Raises:
        InvalidMessage: the update is for another round or client; its names or shapes differ from the plan's
            adapter; a value is not finite; or its counts, steps or rows are impossible under the plan.
    """
    for field in ("round", "client", "active_experts", "trainable"):
        got, wanted = getattr(update, field), getattr(plan, field)
        if got != wanted:
            raise InvalidMessage(f"update is for {field} {got}; {wanted} was asked for")
    _validate_values(update.delta.tensors(), plan.adapter.tensors())
    _validate_values({"rescaler_values": update.rescaler_values}, {"rescaler_values": plan.rescaler_values})
    if plan.rescaler == "fixed" and not torch.equal(update.rescaler_values, plan.rescaler_values):
        raise InvalidMessage("update has other rescaler_values than the fixed ones of the plan")
    if update.loss is not None and not math.isfinite(update.loss):
        raise InvalidMessage(f"update has loss {update.loss}; it must be finite")
    if update.steps > plan.max_steps:
        raise InvalidMessage(f"update has {update.steps} steps; at most {plan.max_steps} were asked for")
    if update.num_examples < 1 or update.steps < 1:
        raise InvalidMessage(
            f"update has {update.num_examples} examples and {update.steps} steps; both must be >= 1"
        )
    possible = plan.most_tokens(update.steps, max_length)
    if not 1 <= update.tokens <= possible:
        raise InvalidMessage(
            f"update has {update.tokens} tokens; {update.steps} steps of this plan have 1 to {possible}"
        )
    _validate_counts(update, plan)
    _validate_terms(update, plan)
    # The weight in the mean: a client must not claim more rows than it can have trained on.
    batches = update.steps * plan.gradient_accumulation_steps
    many = plan.tokens_per_step or plan.packed_length  # rows of one token each
    most = min(update.num_examples, update.tokens if many else batches * plan.batch_size)
    if not 1 <= update.trained_examples <= most:
        raise InvalidMessage(
            f"update claims to have trained on {update.trained_examples} rows; 1 to {most} are possible"
        )


def _validate_terms(update: ClientUpdate, plan: RoundPlan) -> None:
    for name, most in (("sampling_rate", 1), ("noise_multiplier", 1e6)):
        value = getattr(update, name)
        if not (0 < value <= most if plan.is_private else value == 0):  # NaN is in no range
            allowed = (
                f"above 0 and at most {most:g}" if plan.is_private else "0, since the plan is not private"
            )
            raise InvalidMessage(f"update has {name} = {value}; it must be {allowed}")


MOST_TEST_ROWS = 1 << 31
"""A client that did not say how many rows it scores may have so many."""
MOST_LOSS = 1e6
"""Nats per token that an evaluation may have: finite sums of many clients stay finite."""


def validate_evaluation(
    evaluation: ClientEvaluation, plan: EvaluationPlan, max_length: int, most_rows: int | None
) -> None:
    """Check the sums of a client before they are added to those of others.

    Args:
        evaluation: the decoded evaluation.
        plan: the plan that it answers.
        max_length: the most tokens of a row.
        most_rows: the rows that the client said that it holds to score; None if it did not say.

    Raises:
        InvalidMessage: the evaluation is for another round, client or k; or a sum is not finite or impossible
            for its rows and tokens.
    """
    for field in ("round", "client", "active_experts"):
        got, wanted = getattr(evaluation, field), getattr(plan, field)
        if got != wanted:
            raise InvalidMessage(f"evaluation is for {field} {got}; {wanted} was asked for")
    scores = evaluation.exact_matches, evaluation.rouge_l_sum
    if [score is None for score in scores] != [plan.max_new_tokens == 0] * 2:
        raise InvalidMessage("evaluation has other scores than those that were asked for")
    rows, tokens = evaluation.rows, evaluation.response_tokens
    for name, least, most in (
        ("rows", 1, MOST_TEST_ROWS if most_rows is None else most_rows),
        ("response_tokens", 1, rows * max_length),
        ("loss_sum", 0, tokens * MOST_LOSS),
        ("exact_matches", 0, rows),
        ("rouge_l_sum", 0, rows),
    ):
        value = getattr(evaluation, name)
        if value is not None and not least <= value <= most:  # NaN is in no range
            raise InvalidMessage(f"evaluation has {name} = {value}; {least} to {most:g} are possible")


MOST_TIMES_MEDIAN = 10
"""A client weighs by at most this many times the median of what clients claim to hold."""
MOST_TIMES_EVEN = 8
"""An expert's count is believed up to this many times that of even use. Honest clients of the default run
reach 2.3, 2.8, 5.1 and 7.1 at k = 8, 4, 2 and 1; a liar with k = 1 could claim 64 times for one of 64."""


def most_rows(claims: Iterable[int]) -> int:
    """Return the rows by which a client may weigh, from what clients claim to hold; 0 if none has said it.

    Of two clients the smaller claim is the median.
    """
    known = [claim for claim in claims if claim]
    return MOST_TIMES_MEDIAN * median_low(known) if known else 0


def believed(update: ClientUpdate, rows: int) -> ClientUpdate:
    """Return the update with its weights held to what an honest client reaches, since nobody can check them.

    |D| is at most `rows`, or the rows trained on if that is 0. A count is at most `MOST_TIMES_EVEN` times its
    mean, so that no client takes an expert whole.
    """
    slots, experts = update.tokens * update.active_experts, update.counts.shape[1]
    return replace(
        update,
        num_examples=min(update.num_examples, rows or update.trained_examples),
        counts=update.counts.clamp(max=math.ceil(MOST_TIMES_EVEN * slots / experts)),
    )


def _validate_values(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    if values.keys() != like.keys():
        name = sorted(values.keys() ^ like.keys())[0]
        raise InvalidMessage(f"update and plan differ in tensor {name}")
    for name, value in values.items():
        if value.shape != like[name].shape or value.dtype != torch.float32:
            got, wanted = tuple(value.shape), tuple(like[name].shape)
            raise InvalidMessage(f"update has {name} as {value.dtype} {got}; float32 {wanted} is needed")
        if not bool(torch.isfinite(value).all()):
            raise InvalidMessage(f"update has a value in {name} that is not finite")


def _validate_counts(update: ClientUpdate, plan: RoundPlan) -> None:
    counts, k = update.counts, plan.active_experts
    layers = len(plan.rescaler_values)
    num_experts = next(iter(plan.adapter.experts.values())).shape[0]
    if counts.shape != (layers, num_experts) or counts.dtype != torch.int64:
        raise InvalidMessage(
            f"counts are {counts.dtype} {tuple(counts.shape)}; int64 {(layers, num_experts)} is needed"
        )
    if int(counts.min()) < 0 or int(counts.max()) > update.tokens:
        raise InvalidMessage(f"counts must lie between 0 and the {update.tokens} tokens trained on")
    # In integers of Python: a sum of int64 could wrap round to the right number.
    sums = {sum(layer) for layer in counts.tolist()}
    if sums != {update.tokens * k}:
        raise InvalidMessage(
            f"counts of the layers sum to {min(sums)} to {max(sums)}; each must sum to tokens x k = "
            f"{update.tokens} x {k}"
        )
