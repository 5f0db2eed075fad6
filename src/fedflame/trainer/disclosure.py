"""What a site tells of losses, scores and activation counts: all, in rough numbers, or nothing.

The hub needs counts whose sum is right, and the delta of an expert shows anyway whether it was used. So rough
counts keep both: in each layer they sum to tokens x k, and an expert that was used has a count.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedflame.config.words import Disclosure
from fedflame.messages import ClientEvaluation, ClientUpdate

_DIGITS = 1
"""Decimals of a rounded loss, in nats, and of a rounded score."""


def disclosed(update: ClientUpdate, disclosure: Disclosure) -> ClientUpdate:
    """Return the update as the site tells it.

    `rounded`: the loss has one decimal, and the counts are shared out by their first digits. `withheld`:
    there is no loss, and the counts of a layer are shared out evenly over the experts that were used.
    """
    if disclosure == "exact":
        return update
    layers = [
        _shared_out(
            [_first_digit(count) if disclosure == "rounded" else min(count, 1) for count in layer],
            update.tokens * update.active_experts,
            update.tokens,
        )
        for layer in update.counts.tolist()
    ]
    loss = None
    if disclosure == "rounded" and update.loss is not None:
        loss = round(update.loss, _DIGITS)
    return replace(update, counts=torch.tensor(layers), loss=loss)


def disclosed_scores(evaluation: ClientEvaluation, disclosure: Disclosure) -> ClientEvaluation:
    """Return the evaluation as the site tells it. `rounded`: each mean has one decimal.

    A site that withholds makes no evaluation; see `rows.require_tests`.
    """
    if disclosure == "exact":
        return evaluation
    rows, tokens = evaluation.rows, evaluation.response_tokens
    exact, rouge = evaluation.exact_matches, evaluation.rouge_l_sum
    return replace(
        evaluation,
        loss_sum=round(evaluation.loss_sum / tokens, _DIGITS) * tokens,
        exact_matches=None if exact is None else round(round(exact / rows, _DIGITS) * rows),
        rouge_l_sum=None if rouge is None else round(rouge / rows, _DIGITS) * rows,
    )


def _first_digit(count: int) -> int:
    """Return the count with zeros after its first digit."""
    digits = str(count)
    return int(digits[0] + "0" * (len(digits) - 1))


def _shared_out(weights: list[int], total: int, most: int) -> list[int]:
    """Share `total` in proportion to the weights; a share is from 1 to `most`, and 0 where the weight is.

    That it is 1 at least, and that no more is left than the others can take, follows: the largest go first,
    and the weights sum to no more than `total`, which is no more than `most` for each.
    """
    shares = [0] * len(weights)
    left, weight_left = total, sum(weights)
    for index in sorted((index for index, weight in enumerate(weights) if weight), key=lambda i: -weights[i]):
        shares[index] = min(round(left * weights[index] / weight_left), most)
        left, weight_left = left - shares[index], weight_left - weights[index]
    return shares
