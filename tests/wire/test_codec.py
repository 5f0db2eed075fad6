"""The codec bit for bit and under attack: what comes back is what was sent, or a refusal with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from tests.examples_drawn import MANY
from tests.message_samples import (
    IN,
    MAX_LENGTH,
    OUT,
    SHAPE,
    Shape,
    a_plan,
    an_adapter,
    an_update,
    assert_same_bits,
    assert_same_message,
    assert_usable,
    random_bits,
)
from torch import Tensor

from fedflame.config.words import UpdateDtype
from fedflame.errors import InvalidMessage
from fedflame.messages import Adapter, ClientUpdate, RoundPlan, half_of
from fedflame.server.validation import validate_update
from fedflame.wire.codec import decode_plan, decode_update, encode_plan, encode_update, update_limit
from fedflame.wire.frame import seal, unseal
from fedflame.wire.planes import compress, decompress


def body_of(message: bytes) -> bytes:
    """The safetensors buffer of a plan or, compressed, of an update."""
    body = unseal(message)
    return bytes(body) if is_plan(message) else decompress(body, 1 << 20)


def is_plan(message: bytes) -> bool:
    """By the start of a safetensors header; a compressed body has a length there, never as large."""
    return unseal(message)[8:10] == b'{"'


def with_body(message: bytes, body: bytes) -> bytes:
    """Sealed as a message of the same kind."""
    return seal(body if is_plan(message) else compress(body))


def header_of(message: bytes) -> dict[str, Any]:
    body = body_of(message)
    size = int.from_bytes(body[:8], "little")
    return json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["fedflame"])


def tensor_bytes(message: bytes) -> int:
    body = body_of(message)
    return len(body) - 8 - int.from_bytes(body[:8], "little")


def forge(message: bytes, header: dict[str, Any] | None = None, **tensors: Tensor | None) -> bytes:
    """Sealed again with other header fields and tensors; None removes. Dots in names are written `__`."""
    values: dict[str, Tensor | None] = {**load(body_of(message))}
    values |= {name.replace("__", "."): value for name, value in tensors.items()}
    fields_now = {
        name: value for name, value in (header_of(message) | (header or {})).items() if value is not ...
    }
    kept = {name: value.contiguous() for name, value in values.items() if value is not None}
    return with_body(message, save(kept, {"fedflame": json.dumps(fields_now)}))


def update_bytes(update: ClientUpdate, update_dtype: Any = "float32") -> bytes:
    return encode_update(update, replace(a_plan(), update_dtype=update_dtype))


def read_update(message: bytes, update_dtype: Any = "float32") -> ClientUpdate:
    return decode_update(message, replace(a_plan(), update_dtype=update_dtype))


shapes = st.permutations(range(1, 8)).map(lambda sizes: (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]))
seeds = st.integers(0, 2**32)
any_float = st.floats(allow_nan=True, allow_infinity=True)


# The codec, bit for bit


@settings(deadline=None)
@given(
    shapes, seeds, st.sampled_from(("learned", "fixed", "mass")), st.floats(0, 1e6), st.integers(0, 2**63 - 1)
)
def test_a_plan_comes_back_bit_for_bit(
    shape: Shape, seed: int, rescaler: Any, rate: float, number: int
) -> None:
    plan = replace(a_plan(shape, seed, random_bits), rescaler=rescaler, learning_rate=rate, seed=number)
    assert_same_message(decode_plan(encode_plan(plan)), plan)


@settings(deadline=None)
@given(shapes, seeds, any_float, st.integers(0, 2**63 - 1))
def test_an_update_comes_back_bit_for_bit(shape: Shape, seed: int, loss: float, tokens: int) -> None:
    update = replace(an_update(shape, seed, random_bits), loss=loss, tokens=tokens)
    plan = a_plan(shape)
    assert_same_message(decode_update(encode_update(update, plan), plan), update)


@settings(deadline=None)
@given(shapes, seeds, st.integers(-(2**63), 2**63 - 1))
def test_counts_of_any_size_come_back_bit_for_bit(shape: Shape, seed: int, count: int) -> None:
    update, plan = an_update(shape, seed, counts=torch.full(shape[:2], count)), a_plan(shape)
    assert_same_message(decode_update(encode_update(update, plan), plan), update)


def test_the_same_message_gives_the_same_bytes_also_after_a_round_trip() -> None:
    update, plan = update_bytes(an_update()), encode_plan(a_plan())
    assert update == update_bytes(an_update()) == update_bytes(read_update(update))
    assert plan == encode_plan(a_plan()) == encode_plan(decode_plan(plan))


def test_values_that_are_not_contiguous_come_back() -> None:
    update = an_update()
    turned = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2)
        for name, value in update.delta.experts.items()
    }
    assert not any(value.is_contiguous() for value in turned.values())
    strided = replace(update, delta=Adapter(turned, update.delta.attention))
    assert_same_message(read_update(update_bytes(strided)), update)


def test_a_plan_without_attention_lora_comes_back() -> None:
    plan = a_plan()
    bare = replace(plan, adapter=Adapter(plan.adapter.experts, {}))
    assert_same_message(decode_plan(encode_plan(bare)), bare)


def test_a_plan_with_merged_factors_of_another_rank_comes_back_bit_for_bit() -> None:
    layers, experts, _, hidden, width = SHAPE
    merged = an_adapter((layers, experts, 11, hidden, width), random_bits, torch.Generator().manual_seed(4))
    plan = replace(a_plan(), merged=merged, trainable="B")
    buffer = encode_plan(plan)
    assert_same_message(decode_plan(buffer), plan)
    floats = sum(value.numel() for value in merged.tensors().values())
    assert tensor_bytes(buffer) == tensor_bytes(encode_plan(a_plan())) + 4 * floats


# Only what was activated travels


@settings(deadline=None)
@given(seeds)
def test_an_update_holds_just_the_activated_experts_slices(seed: int) -> None:
    layers, _, rank, hidden, width = SHAPE
    update = an_update(seed=seed)
    activated = sum(count > 0 for row in update.counts.tolist() for count in row)
    per_expert = 2 * rank * hidden + 2 * width * rank + rank * width + hidden * rank
    floats = activated * per_expert + rank * IN + OUT * rank + layers
    assert tensor_bytes(update_bytes(update)) == 4 * floats + 8 * update.counts.numel()


@settings(deadline=None)
@given(seeds, st.integers(0, 1), st.integers(0, 4))
def test_an_untouched_experts_delta_is_zero_whatever_it_was(seed: int, layer: int, expert: int) -> None:
    update = an_update(seed=seed, counts=torch.ones(SHAPE[:2], dtype=torch.int64))
    update.counts[layer, expert] = 0
    decoded = read_update(update_bytes(update))
    for name, delta in update.delta.experts.items():
        wanted = delta.clone()
        assert wanted[expert].any(), "the delta that must not travel is there"
        if name.startswith(f"{layer}."):
            wanted[expert] = 0.0
        assert_same_bits(decoded.delta.experts[name], wanted, name)


def test_an_update_that_activated_nothing_comes_back_as_zeros() -> None:
    update = an_update(counts=torch.zeros(SHAPE[:2], dtype=torch.int64))
    assert_same_message(read_update(update_bytes(update)), update)


# Only the half that was trained travels


def half_update(trainable: Any) -> ClientUpdate:
    """An update with zero deltas in the other half, and experts of no activation in both layers."""
    update = an_update(counts=torch.tensor([[0, 3, 0, 1, 2], [0, 0, 0, 0, 5]]))
    values = {
        name: value if half_of(name) == trainable else torch.zeros_like(value)
        for name, value in update.delta.tensors().items()
    }
    return replace(update, delta=Adapter.from_tensors(values), trainable=trainable)


@pytest.mark.parametrize("trainable", ["A", "B"])
def test_a_frozen_half_does_not_travel_and_comes_back_as_zeros(trainable: str) -> None:
    layers, _, rank, hidden, width = SHAPE
    update = half_update(trainable)
    buffer = update_bytes(update)
    assert_same_message(read_update(buffer), update)
    activated, a_floats, b_floats = 4, 2 * rank * hidden + rank * width, 2 * width * rank + hidden * rank
    floats = activated * (a_floats if trainable == "A" else b_floats)
    floats += rank * IN if trainable == "A" else OUT * rank
    assert tensor_bytes(buffer) == 4 * (floats + layers) + 8 * update.counts.numel()


@pytest.mark.parametrize("trainable", ["A", "B"])
def test_of_a_frozen_half_there_is_no_scale_either(trainable: str) -> None:
    update = half_update(trainable)
    got = read_update(update_bytes(update, "int8"), "int8").delta.tensors()
    for name, value in update.delta.tensors().items():
        assert bool(got[name].any()) == bool(value.any()) == (half_of(name) == trainable), name


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


# Rounded values travel, and only they


@settings(deadline=None)
@given(shapes, seeds)
def test_in_bfloat16_each_value_is_the_nearest_one(shape: Shape, seed: int) -> None:
    update, plan = an_update(shape, seed), replace(a_plan(shape), update_dtype="bfloat16")
    got = decode_update(encode_update(update, plan), plan).delta.tensors()
    for name, value in update.delta.tensors().items():
        assert_same_bits(got[name], value.bfloat16().float(), name)


@settings(deadline=None)
@given(shapes, seeds)
def test_in_int8_each_expert_has_its_own_127_steps(shape: Shape, seed: int) -> None:
    update, plan = an_update(shape, seed), replace(a_plan(shape), update_dtype="int8")
    drawn = torch.Generator().manual_seed(seed)
    spread = update.delta.combine(update.delta, lambda value, _: value * 10 ** torch.randn(
        value.shape[:1] + (1,) * (value.dim() - 1), generator=drawn
    ))  # fmt: skip
    got = decode_update(encode_update(replace(update, delta=spread), plan), plan).delta
    for name, value in spread.experts.items():
        for expert in range(shape[1]):
            assert_within_half_a_step(got.experts[name][expert], value[expert])
    for name, value in spread.attention.items():
        assert_within_half_a_step(got.attention[name], value)


def assert_within_half_a_step(got: Tensor, wanted: Tensor) -> None:
    """By plain loops in float64; the scale, the quotient and the product are each rounded to float32."""
    largest = max(abs(number) for row in wanted.tolist() for number in row)
    for mine, its in zip(got.flatten().tolist(), wanted.flatten().tolist(), strict=True):
        assert abs(mine - its) <= largest * (1 / 254 + 2**-22)
        assert its or mine == 0


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("int8", 1)])
def test_rounded_values_take_their_size_and_int8_four_bytes_a_matrix(dtype: str, size: int) -> None:
    layers, experts, rank, hidden, width = SHAPE
    counts = torch.tensor([[0, 3, 0, 1, 2], [0, 0, 0, 0, 5]])
    activated, banks, modules = 4, 4, 2
    values = activated * (2 * rank * hidden + 2 * width * rank + rank * width + hidden * rank)
    values += rank * IN + OUT * rank
    scales = 4 * (activated * banks + modules) if dtype == "int8" else 0
    wanted = size * values + scales + 4 * layers + 8 * layers * experts
    assert tensor_bytes(update_bytes(an_update(counts=counts), dtype)) == wanted


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


# Buffers that are not what they should be


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


DECODERS: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "plan": (decode_plan, encode_plan(a_plan())),
    **{
        f"update in {dtype}": (
            partial(read_update, update_dtype=dtype),
            update_bytes(an_update(), dtype),
        )
        for dtype in get_args(UpdateDtype)
    },
}
UPDATE = update_bytes(an_update())
both_kinds = pytest.mark.parametrize("kind", DECODERS)


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
    with pytest.raises(InvalidMessage, match=r"message of version 2; this fedflame reads version 3"):
        read_update(message[:8] + (2).to_bytes(8, "little") + message[16:])
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
    "name", ["round", "client", "seed", "active_experts", "batch_size", "max_steps", "tokens_per_step"]
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


def test_counts_of_more_dimensions_are_refused_also_where_the_experts_are_as_many() -> None:
    counts = torch.ones(2, 2, 1, dtype=torch.int64)  # nonzero gives two indices for each of two experts
    with pytest.raises(InvalidMessage, match="the plan and the counts make it"):
        read_update(forge(update_bytes(an_update()), counts=counts))


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
