"""Plans and answers of an evaluation as bytes: what was sent comes back, or a refusal with a reason."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.examples_drawn import MANY
from tests.message_samples import MAX_LENGTH, SHAPE, a_plan, adapter_of, assert_same_message, random_bits

from fedflame.cost.scoring_cost import SUMS_BYTES
from fedflame.errors import InvalidMessage
from fedflame.messages import ClientEvaluation, EvaluationPlan
from fedflame.server.validation import validate_evaluation
from fedflame.wire.addition import decode_addition, encode_addition
from fedflame.wire.buffer import pack
from fedflame.wire.codec import (
    EVALUATION_LIMIT,
    asks_for_scores,
    decode_evaluation,
    decode_evaluation_plan,
    decode_plan,
    encode_evaluation,
    encode_plan,
    encoded_plan_work,
)
from fedflame.wire.frame import seal

TOLD = ClientEvaluation(0, 2**31, 2, 5, 40, 0.1 + 0.2, 3, 2.5)


def a_plan_to_score(seed: int = 0, **changes: Any) -> EvaluationPlan:
    generator = torch.Generator().manual_seed(seed)
    adapter = adapter_of(SHAPE, random_bits, generator)
    plan = EvaluationPlan(
        0, 7, 2, random_bits(generator, SHAPE[0]), adapter, adapter_of(SHAPE, random_bits, generator), 24
    )
    return replace(plan, **changes)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 100))
def test_a_plan_comes_back_bit_for_bit(round_number: int, seed: int) -> None:
    plan = a_plan_to_score(seed, round=round_number)
    assert_same_message(decode_evaluation_plan(encode_plan(plan)), plan)  # type: ignore[arg-type]


LARGEST = ClientEvaluation(*[2**62] * 5, -1.2345678901234567e-300, 2**62, -1.2345678901234567e-300)


@pytest.mark.parametrize("told", [TOLD, replace(TOLD, exact_matches=None, rouge_l_sum=None), LARGEST])
def test_an_evaluation_comes_back_as_it_was_in_a_few_bytes(told: ClientEvaluation) -> None:
    message = encode_evaluation(told)
    assert decode_evaluation(message) == told and len(message) <= SUMS_BYTES < EVALUATION_LIMIT


def test_the_two_plans_are_told_apart() -> None:
    score, train = encode_plan(a_plan_to_score()), encode_plan(a_plan())
    assert asks_for_scores(score) and not asks_for_scores(train)
    assert not asks_for_scores(b"nothing") and not asks_for_scores(b"x" * 300)
    with pytest.raises(InvalidMessage, match="got a message of kind 'evaluation plan'; 'plan' is needed"):
        decode_plan(score)
    with pytest.raises(InvalidMessage, match="got a message of kind 'plan'; 'evaluation plan' is needed"):
        decode_evaluation_plan(train)
    assert encoded_plan_work(score) == 2 * 25
    assert encoded_plan_work(encode_plan(a_plan_to_score(max_new_tokens=0))) == 2


def test_a_plan_of_training_adds_to_one_of_an_evaluation_and_the_other_way_round() -> None:
    train = a_plan()
    score = EvaluationPlan(3, 7, 2, train.rescaler_values, train.adapter)
    for plan, held in ((encode_plan(train), encode_plan(score)), (encode_plan(score), encode_plan(train))):
        addition = encode_addition(memoryview(bytearray(plan)), memoryview(bytearray(held)))
        assert addition is not None and decode_addition(addition, held) == plan
        assert len(addition) < len(plan)


@pytest.mark.parametrize("place", [0, 20, 60, -1])
def test_a_message_that_is_damaged_is_refused(place: int) -> None:
    for message, decode in ((encode_plan(a_plan_to_score()), decode_evaluation_plan),
                            (encode_evaluation(TOLD), decode_evaluation)):  # fmt: skip
        damaged = bytearray(message)
        damaged[place] ^= 1
        with pytest.raises(InvalidMessage):
            decode(bytes(damaged))
        with pytest.raises(InvalidMessage):
            decode(message[:place])


def said(header: dict[str, Any], **tensors: torch.Tensor) -> bytes:
    return seal(pack(tensors, {"kind": "evaluation"} | header))


def test_an_evaluation_with_tensors_or_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="tensors missing or unknown: rows"):
        decode_evaluation(said(asdict(TOLD), rows=torch.ones(3)))
    with pytest.raises(InvalidMessage, match="evaluation of 65,537 bytes; it has at most 65,536"):
        decode_evaluation(bytes(EVALUATION_LIMIT + 1))
    lacking = {name: value for name, value in asdict(TOLD).items() if name != "rouge_l_sum"}
    for header in (lacking, asdict(TOLD) | {"row_1": "secret"}):
        with pytest.raises(InvalidMessage, match="fields missing, unknown or said twice: "):
            decode_evaluation(said(header))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**62, 2**63, 10**400, "1"])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=MANY, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(asdict(TOLD))), json_values, min_size=1, max_size=3))
def test_values_of_any_type_are_refused_or_finite_figures(changes: dict[str, Any]) -> None:
    plan = a_plan_to_score(client=TOLD.client)
    try:
        told = decode_evaluation(said(asdict(TOLD) | changes))
        validate_evaluation(told, plan, MAX_LENGTH, 5)
    except InvalidMessage as reason:
        assert str(reason)
        return
    assert 1 <= told.rows <= 5 and 1 <= told.response_tokens <= told.rows * MAX_LENGTH
    assert math.isfinite(told.loss_sum) and told.loss_sum >= 0
    assert told.exact_matches is not None and 0 <= told.exact_matches <= told.rows
    assert told.rouge_l_sum is not None and 0 <= told.rouge_l_sum <= told.rows
    assert type(told.rows) is type(told.response_tokens) is type(told.exact_matches) is int
