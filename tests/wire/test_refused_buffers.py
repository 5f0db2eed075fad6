"""Buffers that are not what they should be: refused with a reason, before memory is taken for them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load, save
from tests.message_samples import IN, MAX_LENGTH, SHAPE, a_plan, an_update
from tests.wire.forged_messages import (
    DECODERS,
    UPDATE,
    body_of,
    both_kinds,
    forge,
    half_update,
    read_update,
    update_bytes,
    with_body,
)
from torch import Tensor

from fedflame.config.words import UpdateDtype
from fedflame.errors import InvalidMessage
from fedflame.server.validation import validate_update
from fedflame.wire.codec import decode_plan, decode_update, encode_update, update_limit
from fedflame.wire.frame import unseal


@pytest.mark.parametrize(
    ("name", "values"),
    [("attention__layers.0.q_proj.A", torch.ones(3, IN)), ("experts__0.A2", torch.ones(3, 3, 4))],
)
def test_values_in_a_half_that_was_not_trained_are_refused(name: str, values: Tensor) -> None:
    with pytest.raises(InvalidMessage, match=r"the plan and the counts make it"):
        read_update(forge(update_bytes(half_update("B")), **{name: values}))


@pytest.mark.parametrize("value", ["b", "", None, 1, ["B"], True])
def test_a_choice_that_there_is_not_is_refused(value: Any) -> None:
    for kind, name in (
        ("plan", "trainable"),
        ("update in int8", "trainable"),
        ("plan", "rescaler"),
        ("plan", "update_dtype"),
    ):
        decode, buffer = DECODERS[kind]
        with pytest.raises(InvalidMessage, match=f"{name} is .* are allowed"):
            decode(forge(buffer, {name: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", get_args(UpdateDtype))
def test_a_value_that_is_not_finite_is_refused_however_it_travels(dtype: Any, value: float) -> None:
    update = an_update(counts=torch.ones(SHAPE[:2], dtype=torch.int64))
    update.delta.experts["1.A2"][2, 0, 1] = value
    plan = replace(a_plan(), update_dtype=dtype)
    with pytest.raises(InvalidMessage, match=r"1\.A2 that is not finite"):
        validate_update(decode_update(encode_update(update, plan), plan), plan, MAX_LENGTH)


@pytest.mark.parametrize("asked", get_args(UpdateDtype))
@pytest.mark.parametrize("sent", get_args(UpdateDtype))
def test_values_that_travelled_otherwise_than_asked_are_refused(asked: Any, sent: Any) -> None:
    message = update_bytes(an_update(), sent)
    if asked == sent:
        read_update(message, asked)
        return
    with pytest.raises(InvalidMessage, match=r"the plan and the counts make it|tensors missing or unknown"):
        read_update(message, asked)


def test_more_bytes_than_any_answer_has_are_refused_before_they_are_read() -> None:
    plan = a_plan()
    dense = encode_update(an_update(counts=torch.ones(SHAPE[:2], dtype=torch.int64)), plan)
    assert len(dense) <= update_limit(plan)
    with pytest.raises(InvalidMessage, match=r"update of .* bytes; an answer has at most"):
        decode_update(b"x" * (update_limit(plan) + 1), plan)
    with pytest.raises(InvalidMessage, match="no fedflame message"):
        decode_update(b"x" * update_limit(plan), plan)


def test_counts_of_a_million_experts_take_no_memory_for_their_banks() -> None:
    """Unpacked by its own word, this message of 8 MB would be banks of a terabyte."""
    counts = torch.zeros(2, 500_000, dtype=torch.int64)
    counts[:, 0] = 1
    plan = replace(a_plan(), adapter=a_plan((2, 5, 3, 70_000, 4)).adapter)
    message = forge(UPDATE, counts=counts)
    assert len(message) < update_limit(plan)
    with pytest.raises(InvalidMessage, match=r"counts is torch.int64 \(2, 500000\)"):
        decode_update(message, plan)


@both_kinds
def test_a_buffer_truncated_at_any_length_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    for length in range(len(buffer)):
        with pytest.raises(InvalidMessage):
            decode(buffer[:length])


@both_kinds
def test_a_buffer_with_a_byte_too_many_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    with pytest.raises(InvalidMessage):
        decode(buffer + b"\0")


def test_the_other_kind_is_refused() -> None:
    with pytest.raises(InvalidMessage, match=r"not a fedflame update: .* no compressed body"):
        read_update(DECODERS["plan"][1])
    with pytest.raises(InvalidMessage, match="not a fedflame plan"):
        decode_plan(UPDATE)
    with pytest.raises(InvalidMessage, match=r"got a message of kind 'plan'; 'update' is needed"):
        read_update(forge(UPDATE, {"kind": "plan"}))
    with pytest.raises(InvalidMessage, match="got a message of kind 'update'; 'plan' is needed"):
        decode_plan(forge(DECODERS["plan"][1], {"kind": "update"}))


def test_a_message_of_the_other_version_and_a_foreign_file_are_refused() -> None:
    message = UPDATE
    with pytest.raises(InvalidMessage, match=r"message of version 3; this fedflame reads version 4"):
        read_update(message[:8] + (3).to_bytes(8, "little") + message[16:])
    with pytest.raises(InvalidMessage, match="bytes that are no fedflame message"):
        read_update(bytes(unseal(message)))


@both_kinds
def test_a_foreign_safetensors_file_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    for metadata in (None, {"format": "pt"}, {"fedflame": ""}, {"fedflame": "["}):
        with pytest.raises(InvalidMessage, match=f"not a fedflame {kind.split()[0]}"):
            decode(with_body(buffer, save({"x": torch.ones(3)}, metadata)))


@both_kinds
@pytest.mark.parametrize("metadata", ["[1]", "1", "null", '"plan"', "[" * 100_000])
def test_a_header_that_is_no_object_is_refused(kind: str, metadata: str) -> None:
    decode, buffer = DECODERS[kind]
    with pytest.raises(InvalidMessage):
        decode(with_body(buffer, save(load(body_of(buffer)), {"fedflame": metadata})))


@both_kinds
def test_a_header_with_a_field_too_few_or_too_many_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    for name, value in (("client", ...), ("colour", "blue"), ("counts", [1]), ("delta", 1), ("adapter", 1)):
        with pytest.raises(InvalidMessage, match=f"fields missing, unknown or said twice: {name}$"):
            decode(forge(buffer, {name: value}))


@both_kinds
def test_a_tensor_too_few_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    with pytest.raises(InvalidMessage):
        decode(forge(buffer, rescaler_values=None))
    with pytest.raises(InvalidMessage):
        decode(forge(buffer, {"rescaler_values": [1.0, 1.0]}, rescaler_values=None))


@both_kinds
def test_a_tensor_too_many_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    with pytest.raises(InvalidMessage, match=r"tensors missing or unknown: x$"):
        decode(forge(buffer, x=torch.ones(3)))


NO_INTEGERS = ("7", None, [7], {"a": 7}, 7.5, True, math.nan, math.inf, 2**63, 10**400)
NO_NUMBERS = ("1.0", None, [1.0], True, 10**400)


@pytest.mark.parametrize("name", ["round", "client", "active_experts", "tokens", "num_examples", "steps"])
def test_an_update_with_a_field_that_is_no_64_bit_integer_is_refused(name: str) -> None:
    """A NaN among tokens or rows would pass every comparison and poison the weighted mean."""
    for value in NO_INTEGERS:
        with pytest.raises(InvalidMessage):
            read_update(forge(UPDATE, {name: value}))


@pytest.mark.parametrize(
    "name",
    [
        "round",
        "client",
        "seed",
        "active_experts",
        "batch_size",
        "max_steps",
        "tokens_per_step",
        "gradient_accumulation_steps",
    ],
)
def test_a_plan_with_a_field_that_is_no_64_bit_integer_is_refused(name: str) -> None:
    for value in NO_INTEGERS:
        with pytest.raises(InvalidMessage):
            decode_plan(forge(DECODERS["plan"][1], {name: value}))


def test_a_field_that_is_no_number_where_one_is_needed_is_refused() -> None:
    for value in NO_NUMBERS:
        if value is not None:  # a client may withhold its loss
            with pytest.raises(InvalidMessage):
                read_update(forge(UPDATE, {"loss": value}))
        for name in ("learning_rate", "weight_decay"):
            with pytest.raises(InvalidMessage):
                decode_plan(forge(DECODERS["plan"][1], {name: value}))


@pytest.mark.parametrize("rescaler", [None, ["learned"], "Learned", "", True, 3])
def test_a_plan_with_a_rescaler_that_is_not_known_is_refused(rescaler: object) -> None:
    with pytest.raises(InvalidMessage) as refusal:
        decode_plan(forge(DECODERS["plan"][1], {"rescaler": rescaler}))
    assert str(refusal.value) == f"rescaler is {rescaler!r}; learned, fixed, mass are allowed"


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(torch.ones(2, 5, dtype=torch.int64), id="more activated than sent"),
        pytest.param(torch.zeros(2, 5, dtype=torch.int64), id="fewer activated than sent"),
        pytest.param(torch.ones(1, 5, dtype=torch.int64), id="a layer too few"),
        pytest.param(torch.ones(0, 5, dtype=torch.int64), id="no layer"),
        pytest.param(torch.ones(2, dtype=torch.int64), id="one dimension"),
        pytest.param(torch.tensor(1), id="a scalar"),
        pytest.param(torch.ones(2, 5, dtype=torch.complex64), id="complex"),
    ],
)
def test_banks_that_do_not_fit_the_counts_are_refused(counts: Tensor) -> None:
    with pytest.raises(InvalidMessage, match="the plan and the counts make it"):
        read_update(forge(UPDATE, counts=counts))


def test_an_update_without_counts_is_refused() -> None:
    with pytest.raises(InvalidMessage, match=r"counts is torch.float32 \(0,\)"):
        read_update(forge(UPDATE, counts=None))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("experts__0.A1", torch.tensor(1.0)),
        ("experts__0.A1", torch.ones(1, 6, 7)),
        ("experts__2.A1", torch.ones(1, 6, 7)),
        ("experts__gate", torch.ones(1, 6, 7)),
        ("experts__", torch.ones(1)),
        ("experts__0.A1", torch.ones(3, 6, 7, dtype=torch.float8_e4m3fn)),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(name: str, rows: Tensor) -> None:
    counts = torch.tensor([[0, 0, 2, 0, 1], [1, 0, 0, 0, 0]])
    with pytest.raises(InvalidMessage, match=r"the plan and the counts make it|tensors missing or unknown"):
        read_update(forge(update_bytes(an_update(counts=counts)), **{name: rows}))


def test_counts_of_more_dimensions_are_refused_also_where_the_experts_are_as_many() -> None:
    counts = torch.ones(2, 2, 1, dtype=torch.int64)  # nonzero gives two indices for each of two experts
    with pytest.raises(InvalidMessage, match="the plan and the counts make it"):
        read_update(forge(update_bytes(an_update()), counts=counts))
