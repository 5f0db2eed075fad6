"""Every reason for which an update is refused, and what is accepted at the limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.message_samples import MAX_LENGTH, SHAPE, a_plan, an_update, assert_usable, valid_update
from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import Adapter, ClientUpdate
from fedflame.server.validation import validate_update
from fedflame.wire.codec import decode_update, encode_update


def with_delta(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[ClientUpdate], ClientUpdate]:
    def changed(update: ClientUpdate) -> ClientUpdate:
        values = update.delta.tensors()
        return replace(update, delta=Adapter.from_tensors(values | {name: change(values[name])}))

    return changed


def without(name: str) -> Callable[[ClientUpdate], ClientUpdate]:
    def changed(update: ClientUpdate) -> ClientUpdate:
        values = {other: value for other, value in update.delta.tensors().items() if other != name}
        return replace(update, delta=Adapter.from_tensors(values))

    return changed


def with_extra(name: str) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(
        update, delta=Adapter.from_tensors(update.delta.tensors() | {name: torch.zeros(3)})
    )


def with_counts(change: Callable[[Tensor], Tensor]) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(update, counts=change(update.counts))


def with_fields(**values: Any) -> Callable[[ClientUpdate], ClientUpdate]:
    return lambda update: replace(update, **values)


def one_value(value: float) -> Callable[[Tensor], Tensor]:
    """The last element replaced."""

    def changed(tensor: Tensor) -> Tensor:
        result = tensor.clone()
        result.view(-1)[-1] = value
        return result

    return changed


def one_count(layer: int, expert: int, count: int) -> Callable[[Tensor], Tensor]:
    def changed(counts: Tensor) -> Tensor:
        result = counts.clone()
        result[layer, expert] = count
        return result

    return changed


REFUSED: list[tuple[str, Callable[[ClientUpdate], ClientUpdate], str]] = [
    ("another round", with_fields(round=4), "update is for round 4; 3 was asked for"),
    ("another client", with_fields(client=0), "update is for client 0; 7 was asked for"),
    ("another half", with_fields(trainable="A"), "update is for trainable A; both was asked for"),
    ("another k", with_fields(active_experts=1), "update is for active_experts 1; 2 was asked for"),
    (
        "NaN in a bank",
        with_delta("experts.1.B1", one_value(math.nan)),
        "update has a value in experts.1.B1 that is not finite",
    ),
    (
        "inf in a bank",
        with_delta("experts.0.A2", one_value(math.inf)),
        "update has a value in experts.0.A2 that is not finite",
    ),
    (
        "-inf in attention",
        with_delta("attention.layers.0.q_proj.B", one_value(-math.inf)),
        "update has a value in attention.layers.0.q_proj.B that is not finite",
    ),
    (
        "a transposed bank",
        with_delta("experts.1.B2", lambda value: value.transpose(1, 2)),
        "update has experts.1.B2 as torch.float32 (5, 3, 7); float32 (5, 7, 3) is needed",
    ),
    (
        "an expert too few",
        with_delta("experts.0.A1", lambda value: value[:4]),
        "update has experts.0.A1 as torch.float32 (4, 6, 7); float32 (5, 6, 7) is needed",
    ),
    (
        "a double",
        with_delta("attention.layers.0.q_proj.A", Tensor.double),
        "update has attention.layers.0.q_proj.A as torch.float64 (3, 6); float32 (3, 6) is needed",
    ),
    ("a bank missing", without("experts.1.B1"), "update and plan differ in tensor experts.1.B1"),
    (
        "attention missing",
        without("attention.layers.0.q_proj.A"),
        "update and plan differ in tensor attention.layers.0.q_proj.A",
    ),
    ("a bank too many", with_extra("experts.2.A1"), "update and plan differ in tensor experts.2.A1"),
    (
        "NaN in s",
        lambda update: replace(update, rescaler_values=torch.tensor([1.0, math.nan])),
        "update has a value in rescaler_values that is not finite",
    ),
    (
        "s of one layer more",
        with_fields(rescaler_values=torch.ones(3)),
        "update has rescaler_values as torch.float32 (3,); float32 (2,) is needed",
    ),
    (
        "counts of one layer",
        with_counts(lambda counts: counts[:1]),
        "counts are torch.int64 (1, 5); int64 (2, 5) is needed",
    ),
    (
        "counts transposed",
        with_counts(lambda counts: counts.T),
        "counts are torch.int64 (5, 2); int64 (2, 5) is needed",
    ),
    (
        "counts as int32",
        with_counts(Tensor.int),
        "counts are torch.int32 (2, 5); int64 (2, 5) is needed",
    ),
    (
        "a count above the tokens",
        with_counts(one_count(1, 4, 12)),
        "counts must lie between 0 and the 11 tokens trained on",
    ),
    (
        "a negative count",
        with_counts(one_count(0, 3, -1)),
        "counts must lie between 0 and the 11 tokens trained on",
    ),
    (
        "a layer's counts above tokens x k",
        with_counts(one_count(0, 3, 1)),
        "counts of the layers sum to 22 to 23; each must sum to tokens x k = 11 x 2",
    ),
    (
        "a layer's counts below tokens x k",
        with_counts(one_count(1, 1, 10)),
        "counts of the layers sum to 21 to 22; each must sum to tokens x k = 11 x 2",
    ),
    (
        "no tokens",
        with_fields(tokens=0, counts=torch.zeros(2, 5, dtype=torch.int64)),
        "update has 0 tokens; 5 steps of this plan have 1 to 480",
    ),
    (
        "more tokens than the steps hold",
        with_fields(tokens=481),
        "update has 481 tokens; 5 steps of this plan have 1 to 480",
    ),
    (
        "tokens whose product with k has more than 64 bits",
        with_fields(tokens=2**62),
        f"update has {2**62} tokens; 5 steps of this plan have 1 to 480",
    ),
    ("loss NaN", with_fields(loss=math.nan), "update has loss nan; it must be finite"),
    ("loss inf", with_fields(loss=math.inf), "update has loss inf; it must be finite"),
    ("no rows", with_fields(num_examples=0), "update has 0 examples and 5 steps; both must be >= 1"),
    (
        "no row trained on",
        with_fields(trained_examples=0),
        "update claims to have trained on 0 rows; 1 to 11 are possible",
    ),
    (
        "more rows trained on than tokens",
        with_fields(trained_examples=12),
        "update claims to have trained on 12 rows; 1 to 11 are possible",
    ),
    (
        "more rows trained on than held",
        with_fields(num_examples=8),
        "update claims to have trained on 9 rows; 1 to 8 are possible",
    ),
    ("no steps", with_fields(steps=0), "update has 40 examples and 0 steps; both must be >= 1"),
    ("more steps than the plan", with_fields(steps=26), "update has 26 steps; at most 25 were asked for"),
]


@pytest.mark.parametrize(
    ("change", "reason"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_an_unusable_update_is_refused_with_its_reason(
    change: Callable[[ClientUpdate], ClientUpdate], reason: str
) -> None:
    with pytest.raises(InvalidMessage) as refusal:
        validate_update(change(valid_update()), a_plan(), MAX_LENGTH)
    assert str(refusal.value) == reason


def test_more_rows_trained_on_than_the_steps_hold_are_refused() -> None:
    """Five steps of four rows, or of two batches of four, unless a batch is measured in tokens."""
    plan, update = replace(a_plan(), tokens_per_step=0), replace(valid_update(), trained_examples=20)
    validate_update(update, plan, MAX_LENGTH)
    more = replace(update, trained_examples=21)
    for layout in (plan, replace(plan, padding_free=True)):
        with pytest.raises(InvalidMessage, match="trained on 21 rows; 1 to 20 are possible"):
            validate_update(more, layout, MAX_LENGTH)
    twice = replace(plan, gradient_accumulation_steps=2)
    validate_update(replace(update, num_examples=50, trained_examples=40), twice, MAX_LENGTH)
    with pytest.raises(InvalidMessage, match="trained on 41 rows; 1 to 40 are possible"):
        validate_update(replace(update, num_examples=50, trained_examples=41), twice, MAX_LENGTH)


def test_packed_rows_are_as_many_as_their_tokens_at_most() -> None:
    """Eleven tokens, in five steps of one sequence."""
    plan = replace(a_plan(), batch_size=1, tokens_per_step=0, packed_length=MAX_LENGTH)
    tokens = valid_update().tokens
    many = replace(valid_update(), num_examples=10**6, trained_examples=tokens)
    validate_update(many, plan, MAX_LENGTH)
    with pytest.raises(InvalidMessage, match="trained on 11 rows; 1 to 5 are possible"):
        validate_update(many, replace(plan, packed_length=0), MAX_LENGTH)
    with pytest.raises(InvalidMessage, match=f"trained on {tokens + 1} rows; 1 to {tokens} are possible"):
        validate_update(replace(many, trained_examples=tokens + 1), plan, MAX_LENGTH)


@pytest.mark.parametrize(
    ("changes", "packs", "longest"),
    [
        ({}, False, 20),
        ({"packed_length": 15}, True, 20),  # a row may be longer
        ({"packed_length": 50}, True, 50),
        ({"padding_free": True}, True, 4 * 20),
        ({"padding_free": True, "packed_length": 50}, True, 4 * 50),
        ({"padding_free": True, "tokens_per_step": 96}, True, 96),
        ({"padding_free": True, "tokens_per_step": 7}, True, 20),
    ],
)
def test_the_longest_sequence_of_a_plan(changes: dict[str, Any], packs: bool, longest: int) -> None:
    plan = replace(a_plan(), **{"tokens_per_step": 0} | changes)
    assert (plan.packs, plan.longest_sequence(20)) == (packs, longest)


def test_tokens_are_bounded_by_the_rows_of_the_steps_or_by_their_tokens_and_one_row_at_least() -> None:
    """Five steps of four rows or sequences, of 96 tokens, or of one that is longer than the step."""
    counts = torch.zeros(SHAPE[:2], dtype=torch.int64)
    for changes, most in (
        ({"tokens_per_step": 0}, 5 * 4 * MAX_LENGTH),
        ({"tokens_per_step": 96}, 5 * 96),
        ({"tokens_per_step": 3}, 5 * MAX_LENGTH),
        ({"tokens_per_step": 96, "gradient_accumulation_steps": 3}, 3 * 5 * 96),
        ({"tokens_per_step": 0, "packed_length": 33}, 5 * 4 * 33),
        ({"tokens_per_step": 3, "packed_length": 33}, 5 * 33),
        ({"tokens_per_step": 0, "packed_length": 7}, 5 * 4 * MAX_LENGTH),
    ):
        plan = replace(a_plan(), **changes)
        counts[:, :2] = most
        validate_update(replace(valid_update(), tokens=most, counts=counts), plan, MAX_LENGTH)
        more = replace(valid_update(), tokens=most + 1, counts=counts + (counts > 0).long())
        with pytest.raises(InvalidMessage, match=f"has {most + 1} tokens; 5 steps of this plan have 1 to"):
            validate_update(more, plan, MAX_LENGTH)


def test_counts_whose_sum_wraps_round_to_the_right_number_are_refused() -> None:
    """A plan may allow so many tokens that twenty experts with all of them sum, in 64 bits, to four times."""
    tokens, shape = 2**60, (1, 20, 3, 7, 4)
    plan = replace(a_plan(shape), active_experts=4, tokens_per_step=tokens)
    update = an_update(shape, counts=torch.full((1, 20), tokens))
    update = replace(update, tokens=tokens, active_experts=4)
    assert int(update.counts.sum()) == tokens * 4
    with pytest.raises(InvalidMessage, match=r"each must sum to tokens x k"):
        validate_update(update, plan, MAX_LENGTH)


def test_another_rescaler_than_the_fixed_one_is_refused() -> None:
    plan, update = replace(a_plan(), rescaler="fixed"), valid_update()
    validate_update(replace(update, rescaler_values=plan.rescaler_values.clone()), plan, MAX_LENGTH)
    with pytest.raises(InvalidMessage, match="other rescaler_values than the fixed ones of the plan"):
        validate_update(update, plan, MAX_LENGTH)


def test_the_smallest_update_and_all_steps_of_the_plan_are_accepted() -> None:
    smallest = {"num_examples": 1, "trained_examples": 1, "tokens": 1, "steps": 1}
    counts = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]])
    validate_update(replace(valid_update(), **smallest, counts=counts), a_plan(), MAX_LENGTH)
    validate_update(replace(valid_update(), steps=a_plan().max_steps), a_plan(), MAX_LENGTH)


def test_an_update_at_the_limits_is_accepted() -> None:
    update, plan = valid_update(), a_plan()
    assert int(update.counts.max()) == update.tokens
    assert update.counts.sum(1).tolist() == [update.tokens * plan.active_experts] * SHAPE[0]
    for accepted in (update, decode_update(encode_update(update, plan), plan)):
        validate_update(accepted, plan, MAX_LENGTH)
        assert_usable(accepted, plan)


def test_an_update_without_its_loss_comes_back_and_is_accepted() -> None:
    withheld, plan = replace(valid_update(), loss=None), a_plan()
    received = decode_update(encode_update(withheld, plan), plan)
    assert received.loss is None
    validate_update(received, plan, MAX_LENGTH)
