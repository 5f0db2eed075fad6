"""Bytes, fields and tensors that are changed at random: refused, or what comes back is what was sent."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from tests.examples_drawn import MANY
from tests.message_samples import MAX_LENGTH, a_plan, assert_usable
from tests.wire.forged_messages import (
    DECODERS,
    any_float,
    body_of,
    both_kinds,
    forge,
    header_of,
    update_bytes,
    with_body,
)
from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import RoundPlan
from fedflame.server.validation import validate_update
from fedflame.wire.codec import encode_plan
from fedflame.wire.frame import unseal


def canonical(message: bytes) -> bytes:
    """The header in one order and the tensors, by json and safetensors alone."""
    body = body_of(message)
    header = json.dumps(header_of(message), sort_keys=True)
    return save(load(body), metadata={"fedflame": header})


def assert_refused_or_faithful(kind: str, buffer: bytes) -> None:
    """What decodes encodes to all that was sent, and what passes validation can be aggregated."""
    try:
        message = DECODERS[kind][0](buffer)
    except InvalidMessage as reason:
        assert str(reason)
        return
    if isinstance(message, RoundPlan):
        assert canonical(encode_plan(message)) == canonical(buffer)
        return
    dtype = kind.split()[-1]
    if dtype != "int8":  # steps of a scale that no matrix needs are another scale's steps, too
        assert canonical(update_bytes(message, dtype)) == canonical(buffer)
    try:
        validate_update(message, a_plan(), MAX_LENGTH)
    except InvalidMessage as reason:
        assert str(reason)
    else:
        assert_usable(message, a_plan())


@both_kinds
@settings(deadline=None)
@given(garbage=st.binary(max_size=300))
def test_garbage_is_refused(kind: str, garbage: bytes) -> None:
    with pytest.raises(InvalidMessage):
        DECODERS[kind][0](garbage)
    with pytest.raises(InvalidMessage):
        DECODERS[kind][0](len(garbage).to_bytes(8, "little") + garbage)


@both_kinds
@settings(max_examples=MANY, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_refused_and_under_a_new_seal_too_or_come_back(
    kind: str, data: st.DataObject
) -> None:
    decode, message = DECODERS[kind]
    body = bytearray(body_of(message))
    header = 8 + int.from_bytes(body[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, header - 1) | st.integers(0, len(body) - 1))
        body[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    changed = with_body(message, bytes(body))
    if changed != message:
        with pytest.raises(InvalidMessage, match="checksum"):
            decode(message[: len(message) - len(unseal(message))] + unseal(changed))
    assert_refused_or_faithful(kind, changed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | any_float | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.mark.slow
@both_kinds
@settings(max_examples=MANY, deadline=None)
@given(data=st.data())
def test_a_header_with_changed_fields_is_refused_or_comes_back(kind: str, data: st.DataObject) -> None:
    buffer = DECODERS[kind][1]
    names = st.sampled_from([*header_of(buffer), "rescaler_values", "counts", "delta", "adapter"])
    changes = data.draw(st.dictionaries(names, json_values | st.just(...), min_size=1, max_size=3))
    assert_refused_or_faithful(kind, forge(buffer, changes))


dtypes = st.sampled_from(
    (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.uint16,
        torch.complex64,
    )
)


@pytest.mark.slow
@both_kinds
@settings(max_examples=MANY, deadline=None)
@given(data=st.data())
def test_a_buffer_with_other_tensors_is_refused_or_comes_back(kind: str, data: st.DataObject) -> None:
    buffer = DECODERS[kind][1]
    names = st.sampled_from(
        [*load(body_of(buffer)), "experts.0.X", "experts.9.A1", "experts.A1", "attention.x", "x"]
    )
    changes: dict[str, Tensor | None] = {}
    for name in data.draw(st.lists(names, min_size=1, max_size=3)):
        size = data.draw(st.lists(st.integers(0, 6), max_size=4))
        changes[name] = data.draw(st.none() | st.just(torch.ones(size).to(data.draw(dtypes))))
    assert_refused_or_faithful(kind, forge(buffer, **changes))
