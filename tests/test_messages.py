"""The codec bit for bit and under attack, and every reason for which an update is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from fedflame.messages import (
    NOTHING,
    Adapter,
    ClientUpdate,
    InvalidMessage,
    RoundPlan,
    decode_plan,
    decode_update,
    encode_plan,
    encode_update,
    half_of,
    validate_update,
)

Shape = tuple[int, int, int, int, int]
"""L layers, E experts, R rank, H hidden, I expert width."""
SHAPE: Shape = (2, 5, 3, 7, 4)
IN, OUT = 6, 9


def random_bits(generator: torch.Generator, *shape: int) -> Tensor:
    """fp32 of any bit pattern: denormals, both zeros, infinities and NaNs with their payloads."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)


def random_numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def an_adapter(shape: Shape, values: Callable[..., Tensor], generator: torch.Generator) -> Adapter:
    layers, experts, rank, hidden, width = shape
    banks = {
        "A1": (experts, 2 * rank, hidden),
        "B1": (experts, 2 * width, rank),
        "A2": (experts, rank, width),
        "B2": (experts, hidden, rank),
    }
    attention = {"layers.0.q_proj.A": (rank, IN), "layers.0.q_proj.B": (OUT, rank)}
    return Adapter(
        {
            f"{layer}.{name}": values(generator, *size)
            for layer in range(layers)
            for name, size in banks.items()
        },
        {name: values(generator, *size) for name, size in attention.items()},
    )


def a_plan(shape: Shape = SHAPE, seed: int = 0, values: Callable[..., Tensor] = random_numbers) -> RoundPlan:
    generator = torch.Generator().manual_seed(seed)
    return RoundPlan(
        round=3,
        client=7,
        seed=2**62 + 1,
        active_experts=2,
        rescaler="learned",
        rescaler_values=values(generator, shape[0]),
        adapter=an_adapter(shape, values, generator),
        learning_rate=1e-3,
        weight_decay=0.1,
        batch_size=4,
        max_steps=25,
        tokens_per_step=96,
    )


def an_update(
    shape: Shape = SHAPE,
    seed: int = 1,
    values: Callable[..., Tensor] = random_numbers,
    counts: Tensor | None = None,
) -> ClientUpdate:
    """An update with zero deltas where no token was counted, as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    if counts is None:
        counts = torch.randint(0, 3, shape[:2], generator=generator)
    delta = an_adapter(shape, values, generator)
    experts = {
        name: torch.where((counts[int(name.split(".")[0])] > 0)[:, None, None], value, 0.0)
        for name, value in delta.experts.items()
    }
    return ClientUpdate(
        round=3,
        client=7,
        active_experts=2,
        delta=Adapter(experts, delta.attention),
        rescaler_values=values(generator, shape[0]),
        counts=counts,
        tokens=11,
        num_examples=40,
        steps=5,
        loss=1.25,
    )


def assert_same_bits(got: Tensor, wanted: Tensor, name: str) -> None:
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
    as_integers = torch.int32 if wanted.dtype == torch.float32 else wanted.dtype
    assert torch.equal(got.contiguous().view(as_integers), wanted.contiguous().view(as_integers)), name


def assert_same_message(got: RoundPlan | ClientUpdate, wanted: RoundPlan | ClientUpdate) -> None:
    assert type(got) is type(wanted)
    for field in fields(wanted):
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        if isinstance(b, Adapter):
            assert a.tensors().keys() == b.tensors().keys()
            for name, value in b.tensors().items():
                assert_same_bits(a.tensors()[name], value, name)
        elif isinstance(b, Tensor):
            assert_same_bits(a, b, field.name)
        else:
            assert (type(a), repr(a)) == (type(b), repr(b)), field.name


def header_of(buffer: bytes) -> dict[str, Any]:
    size = int.from_bytes(buffer[:8], "little")
    return json.loads(json.loads(buffer[8 : 8 + size])["__metadata__"]["fedflame"])


def tensor_bytes(buffer: bytes) -> int:
    return len(buffer) - 8 - int.from_bytes(buffer[:8], "little")


def forge(buffer: bytes, header: dict[str, Any] | None = None, **tensors: Tensor | None) -> bytes:
    """The buffer with other header fields and tensors; None removes. Dots in names are written `__`."""
    values: dict[str, Tensor | None] = {**load(buffer)}
    values |= {name.replace("__", "."): value for name, value in tensors.items()}
    fields_now = {
        name: value for name, value in (header_of(buffer) | (header or {})).items() if value is not ...
    }
    kept = {name: value.contiguous() for name, value in values.items() if value is not None}
    return save(kept, metadata={"fedflame": json.dumps(fields_now)})


shapes = st.permutations(range(1, 8)).map(lambda sizes: (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]))
seeds = st.integers(0, 2**32)
any_float = st.floats(allow_nan=True, allow_infinity=True)


# The codec, bit for bit


@settings(deadline=None)
@given(shapes, seeds, st.sampled_from(("learned", "fixed", "mass")), any_float, st.integers(0, 2**63 - 1))
def test_a_plan_comes_back_bit_for_bit(
    shape: Shape, seed: int, rescaler: Any, rate: float, number: int
) -> None:
    plan = replace(a_plan(shape, seed, random_bits), rescaler=rescaler, learning_rate=rate, seed=number)
    assert_same_message(decode_plan(encode_plan(plan)), plan)


@settings(deadline=None)
@given(shapes, seeds, any_float, st.integers(0, 2**63 - 1))
def test_an_update_comes_back_bit_for_bit(shape: Shape, seed: int, loss: float, tokens: int) -> None:
    update = replace(an_update(shape, seed, random_bits), loss=loss, tokens=tokens)
    assert_same_message(decode_update(encode_update(update)), update)


@settings(deadline=None)
@given(shapes, seeds, st.integers(-(2**63), 2**63 - 1))
def test_counts_of_any_size_come_back_bit_for_bit(shape: Shape, seed: int, count: int) -> None:
    update = an_update(shape, seed, counts=torch.full(shape[:2], count))
    assert_same_message(decode_update(encode_update(update)), update)


def test_the_same_message_gives_the_same_bytes_also_after_a_round_trip() -> None:
    update, plan = encode_update(an_update()), encode_plan(a_plan())
    assert update == encode_update(an_update()) == encode_update(decode_update(update))
    assert plan == encode_plan(a_plan()) == encode_plan(decode_plan(plan))


def test_values_that_are_not_contiguous_come_back() -> None:
    update = an_update()
    turned = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2)
        for name, value in update.delta.experts.items()
    }
    assert not any(value.is_contiguous() for value in turned.values())
    strided = replace(update, delta=Adapter(turned, update.delta.attention))
    assert_same_message(decode_update(encode_update(strided)), update)


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
    assert tensor_bytes(encode_update(update)) == 4 * floats + 8 * update.counts.numel()


@settings(deadline=None)
@given(seeds, st.integers(0, 1), st.integers(0, 4))
def test_an_untouched_experts_delta_is_zero_whatever_it_was(seed: int, layer: int, expert: int) -> None:
    update = an_update(seed=seed, counts=torch.ones(SHAPE[:2], dtype=torch.int64))
    update.counts[layer, expert] = 0
    decoded = decode_update(encode_update(update))
    for name, delta in update.delta.experts.items():
        wanted = delta.clone()
        assert wanted[expert].any(), "the delta that must not travel is there"
        if name.startswith(f"{layer}."):
            wanted[expert] = 0.0
        assert_same_bits(decoded.delta.experts[name], wanted, name)


def test_an_update_that_activated_nothing_comes_back_as_zeros() -> None:
    update = an_update(counts=torch.zeros(SHAPE[:2], dtype=torch.int64))
    assert_same_message(decode_update(encode_update(update)), update)


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
    buffer = encode_update(update)
    assert_same_message(decode_update(buffer), update)
    activated, a_floats, b_floats = 4, 2 * rank * hidden + rank * width, 2 * width * rank + hidden * rank
    floats = activated * (a_floats if trainable == "A" else b_floats)
    floats += rank * IN if trainable == "A" else OUT * rank
    assert tensor_bytes(buffer) == 4 * (floats + layers) + 8 * update.counts.numel()


@pytest.mark.parametrize(
    ("name", "values"),
    [("attention__layers.0.q_proj.A", torch.ones(3, IN)), ("experts__0.A2", torch.ones(3, 3, 4))],
)
def test_values_in_a_half_that_was_not_trained_are_refused(name: str, values: Tensor) -> None:
    with pytest.raises(InvalidMessage, match=r"trained"):
        decode_update(forge(encode_update(half_update("B")), **{name: values}))


@pytest.mark.parametrize("value", ["b", "", None, 1, ["B"], True])
def test_a_choice_that_there_is_not_is_refused(value: Any) -> None:
    for kind, name in (("plan", "trainable"), ("update", "trainable"), ("plan", "rescaler")):
        decode, buffer = DECODERS[kind]
        with pytest.raises(InvalidMessage, match=f"{name} is .* are allowed"):
            decode(forge(buffer, {name: value}))


# Buffers that are not what they should be

DECODERS: dict[str, tuple[Callable[[bytes], Any], bytes]] = {
    "plan": (decode_plan, encode_plan(a_plan())),
    "update": (decode_update, encode_update(an_update())),
}
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
    with pytest.raises(InvalidMessage, match=r"got .*plan version 1; .*update version 1 is needed"):
        decode_update(DECODERS["plan"][1])
    with pytest.raises(InvalidMessage, match=r"got .*update version 1; .*plan version 1 is needed"):
        decode_plan(DECODERS["update"][1])


@both_kinds
@pytest.mark.parametrize("version", [0, 2, "1", None, ...])
def test_another_version_is_refused(kind: str, version: object) -> None:
    decode, buffer = DECODERS[kind]
    got = None if version is ... else version
    with pytest.raises(InvalidMessage, match=f"{kind} version {got}; .*{kind} version 1 is needed"):
        decode(forge(buffer, {"version": version}))


@both_kinds
def test_a_foreign_safetensors_file_is_refused(kind: str) -> None:
    decode, _ = DECODERS[kind]
    for metadata in (None, {"format": "pt"}, {"fedflame": ""}, {"fedflame": "["}):
        with pytest.raises(InvalidMessage, match=f"not a fedflame {kind}"):
            decode(save({"x": torch.ones(3)}, metadata=metadata))


@both_kinds
@pytest.mark.parametrize("metadata", ["[1]", "1", "null", '"plan"', "[" * 100_000])
def test_a_header_that_is_no_object_is_refused(kind: str, metadata: str) -> None:
    decode, buffer = DECODERS[kind]
    with pytest.raises(InvalidMessage):
        decode(save(load(buffer), metadata={"fedflame": metadata}))


@both_kinds
def test_a_header_with_a_field_too_few_or_too_many_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    for header in ({"client": ...}, {"colour": "blue"}, {"counts": [1]}, {"delta": 1}, {"adapter": 1}):
        with pytest.raises(InvalidMessage):
            decode(forge(buffer, header))


@both_kinds
def test_a_tensor_too_few_is_refused(kind: str) -> None:
    decode, buffer = DECODERS[kind]
    with pytest.raises(InvalidMessage):
        decode(forge(buffer, rescaler_values=None))
    with pytest.raises(InvalidMessage):
        decode(forge(buffer, {"rescaler_values": [1.0, 1.0]}, rescaler_values=None))


NO_INTEGERS = ("7", None, [7], {"a": 7}, 7.5, True, math.nan, math.inf, 2**63, 10**400)
NO_NUMBERS = ("1.0", None, [1.0], True, 10**400)


@pytest.mark.parametrize("name", ["round", "client", "active_experts", "tokens", "num_examples", "steps"])
def test_an_update_with_a_field_that_is_no_64_bit_integer_is_refused(name: str) -> None:
    """A NaN among tokens or rows would pass every comparison and poison the weighted mean."""
    for value in NO_INTEGERS:
        with pytest.raises(InvalidMessage):
            decode_update(forge(DECODERS["update"][1], {name: value}))


@pytest.mark.parametrize(
    "name", ["round", "client", "seed", "active_experts", "batch_size", "max_steps", "tokens_per_step"]
)
def test_a_plan_with_a_field_that_is_no_64_bit_integer_is_refused(name: str) -> None:
    for value in NO_INTEGERS:
        with pytest.raises(InvalidMessage):
            decode_plan(forge(DECODERS["plan"][1], {name: value}))


def test_a_field_that_is_no_number_where_one_is_needed_is_refused() -> None:
    for value in NO_NUMBERS:
        with pytest.raises(InvalidMessage):
            decode_update(forge(DECODERS["update"][1], {"loss": value}))
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
    with pytest.raises(InvalidMessage, match="expert banks do not fit the activation counts"):
        decode_update(forge(DECODERS["update"][1], counts=counts))


def test_an_update_without_counts_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="unknown or said twice: counts"):
        decode_update(forge(DECODERS["update"][1], counts=None))


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
    with pytest.raises(InvalidMessage, match="expert banks do not fit the activation counts"):
        decode_update(forge(encode_update(an_update(counts=counts)), **{name: rows}))


def canonical(buffer: bytes) -> bytes:
    """The header in one order and the tensors whose names a message knows, by json and safetensors alone."""
    known = ("experts.", "attention.", "rescaler_values", "counts")
    tensors = {name: value for name, value in load(buffer).items() if name.startswith(known)}
    header = header_of(buffer) | {"version": 1}  # `true` and 1.0 pass for it
    return save(tensors, metadata={"fedflame": json.dumps(header, sort_keys=True)})


def assert_usable(update: ClientUpdate, plan: RoundPlan) -> None:
    """What aggregation relies on: the plan's shapes, finite values, counts and weights that make sense."""
    values = update.delta.tensors() | {"rescaler_values": update.rescaler_values}
    wanted = plan.adapter.tensors() | {"rescaler_values": plan.rescaler_values}
    assert {name: value.shape for name, value in values.items()} == {
        name: value.shape for name, value in wanted.items()
    }
    numbers = [number for value in values.values() for number in value.flatten().tolist()]
    assert all(math.isfinite(number) for number in [*numbers, update.loss])
    for layer in update.counts.tolist():
        assert all(0 <= count <= update.tokens for count in layer)
        assert sum(layer) <= update.tokens * plan.active_experts
    assert update.num_examples >= 1


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
    assert canonical(encode_update(message)) == canonical(buffer)
    try:
        validate_update(message, a_plan())
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
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_buffer_with_changed_bytes_is_refused_or_comes_back(kind: str, data: st.DataObject) -> None:
    buffer = bytearray(DECODERS[kind][1])
    header = 8 + int.from_bytes(buffer[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, header - 1) | st.integers(0, len(buffer) - 1))
        buffer[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    assert_refused_or_faithful(kind, bytes(buffer))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | any_float | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@both_kinds
@settings(max_examples=300, deadline=None)
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
    with pytest.raises(InvalidMessage, match="do not fit the activation counts"):
        decode_update(forge(encode_update(an_update()), counts=counts))


@both_kinds
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_buffer_with_other_tensors_is_refused_or_comes_back(kind: str, data: st.DataObject) -> None:
    buffer = DECODERS[kind][1]
    names = st.sampled_from([*load(buffer), "experts.0.X", "experts.9.A1", "experts.A1", "attention.x", "x"])
    changes: dict[str, Tensor | None] = {}
    for name in data.draw(st.lists(names, min_size=1, max_size=3)):
        size = data.draw(st.lists(st.integers(0, 6), max_size=4))
        changes[name] = data.draw(st.none() | st.just(torch.ones(size).to(data.draw(dtypes))))
    assert_refused_or_faithful(kind, forge(buffer, **changes))


# Validation of an update against its plan

VALID_COUNTS = torch.tensor([[11, 6, 5, 0, 0], [0, 11, 0, 0, 11]])
"""Of 11 tokens with k = 2: one expert saw every token, and each layer's sum is just tokens x k."""


def valid_update() -> ClientUpdate:
    return an_update(counts=VALID_COUNTS.clone())


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
        "counts of a layer exceed tokens x k = 11 x 2",
    ),
    (
        "no tokens",
        with_fields(tokens=0, counts=torch.zeros(2, 5, dtype=torch.int64)),
        "counts must lie between 0 and the 0 tokens trained on",
    ),
    ("loss NaN", with_fields(loss=math.nan), "update has loss nan; it must be finite"),
    ("loss inf", with_fields(loss=math.inf), "update has loss inf; it must be finite"),
    ("no rows", with_fields(num_examples=0), "update has 0 examples and 5 steps; both must be >= 1"),
    ("no steps", with_fields(steps=0), "update has 40 examples and 0 steps; both must be >= 1"),
]


@pytest.mark.parametrize(
    ("change", "reason"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_an_unusable_update_is_refused_with_its_reason(
    change: Callable[[ClientUpdate], ClientUpdate], reason: str
) -> None:
    with pytest.raises(InvalidMessage) as refusal:
        validate_update(change(valid_update()), a_plan())
    assert str(refusal.value) == reason


def test_an_update_at_the_limits_is_accepted() -> None:
    update, plan = valid_update(), a_plan()
    assert int(update.counts.max()) == update.tokens
    assert update.counts.sum(1).tolist() == [update.tokens * plan.active_experts] * SHAPE[0]
    for accepted in (update, decode_update(encode_update(update))):
        validate_update(accepted, plan)
        assert_usable(accepted, plan)


def test_combine_and_tensors_name_every_value() -> None:
    a, b = a_plan(seed=1).adapter, a_plan(seed=2).adapter
    difference = a.combine(b, torch.sub).tensors()
    assert difference.keys() == a.tensors().keys()
    for name, value in difference.items():
        assert torch.equal(value, a.tensors()[name] - b.tensors()[name])
    back = Adapter.from_tensors(a.tensors() | {"counts": torch.ones(2)})
    assert {name: value is back.tensors()[name] for name, value in a.tensors().items()} == dict.fromkeys(
        a.tensors(), True
    )


def low_rank_products(adapter: Adapter) -> dict[str, Tensor]:
    """B A of every projection in float64, gate and up apart."""
    found = {}
    values = {name: value.double() for name, value in adapter.tensors().items()}
    for layer in range(SHAPE[0]):
        a1, b1, a2, b2 = (values[f"experts.{layer}.{bank}"] for bank in ("A1", "B1", "A2", "B2"))
        for expert in range(SHAPE[1]):
            gate_a, up_a = a1[expert].chunk(2)
            gate_b, up_b = b1[expert].chunk(2)
            found |= {(layer, expert, "gate"): gate_b @ gate_a, (layer, expert, "up"): up_b @ up_a}
            found[layer, expert, "down"] = b2[expert] @ a2[expert]
    query = "attention.layers.0.q_proj"
    return found | {"q": values[f"{query}.B"] @ values[f"{query}.A"]}


def test_side_by_side_the_products_are_the_sums_and_the_ranks_too() -> None:
    layers, experts, rank, hidden, width = SHAPE
    one = an_adapter(SHAPE, random_numbers, torch.Generator().manual_seed(1))
    other = an_adapter((layers, experts, 5, hidden, width), random_numbers, torch.Generator().manual_seed(2))
    both = one.concatenate(other)
    assert (one.rank, other.rank, both.rank) == (rank, 5, rank + 5)
    got, first, second = (low_rank_products(adapter) for adapter in (both, one, other))
    for name, value in got.items():
        torch.testing.assert_close(value, first[name] + second[name], rtol=1e-12, atol=1e-12)


def test_nothing_beside_an_adapter_is_that_adapter() -> None:
    adapter = a_plan().adapter
    assert adapter.concatenate(NOTHING) is NOTHING.concatenate(adapter) is adapter
    assert NOTHING.concatenate(NOTHING).rank == 0


def test_of_several_the_products_are_summed_in_their_order() -> None:
    adapters = [a_rank(rank, seed=rank) for rank in (2, 1, 4)]
    all_of = adapters[0].concatenate(NOTHING, *adapters[1:])
    assert all_of.rank == 7
    for name, value in low_rank_products(all_of).items():
        wanted = sum(low_rank_products(adapter)[name] for adapter in adapters)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    in_pairs = adapters[0].concatenate(adapters[1]).concatenate(adapters[2])
    assert all(torch.equal(value, all_of.tensors()[name]) for name, value in in_pairs.tensors().items())


# Ranks


def a_rank(rank: int, seed: int = 0) -> Adapter:
    layers, experts, _, hidden, width = SHAPE
    generator = torch.Generator().manual_seed(seed)
    return an_adapter((layers, experts, rank, hidden, width), random_numbers, generator)


ranks = st.integers(1, 9)


@settings(deadline=None)
@given(ranks, ranks, seeds)
def test_the_first_ranks_are_those_of_every_product_by_hand(rank: int, wanted: int, seed: int) -> None:
    adapter = a_rank(rank, seed)
    got = adapter.with_rank(wanted).tensors()
    kept = min(rank, wanted)
    for name, value in adapter.tensors().items():
        if name.endswith("A1"):
            pairs = zip(got[name].chunk(2, dim=1), value.chunk(2, dim=1), strict=True)
        else:
            pairs = iter([(got[name], value)])
        for mine, its in pairs:
            dim = (1 if its.dim() == 3 else 0) if half_of(name) == "A" else its.dim() - 1
            assert mine.shape[dim] == wanted
            assert torch.equal(mine.narrow(dim, 0, kept), its.narrow(dim, 0, kept)), name
            assert not mine.narrow(dim, kept, wanted - kept).any(), name


@settings(deadline=None)
@given(ranks, ranks, seeds)
def test_zeros_after_the_ranks_change_no_product_and_cut_off_leave_every_bit(
    rank: int, more: int, seed: int
) -> None:
    adapter = a_rank(rank, seed)
    padded = adapter.with_rank(rank + more)
    assert padded.rank == rank + more
    back = padded.with_rank(rank).tensors()
    for name, value in adapter.tensors().items():
        assert_same_bits(back[name], value, name)
    wanted = low_rank_products(adapter)
    for name, value in low_rank_products(padded).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(ranks, ranks)
def test_two_cuts_are_the_smaller_one(one: int, other: int) -> None:
    adapter = a_rank(9)
    got = adapter.with_rank(max(one, other)).with_rank(min(one, other)).tensors()
    for name, value in adapter.with_rank(min(one, other)).tensors().items():
        assert_same_bits(got[name], value, name)


def test_factors_are_those_of_each_product_and_come_back_bit_for_bit() -> None:
    adapter = a_plan(values=random_bits).adapter
    back = Adapter.from_factors(adapter.factors()).tensors()
    assert list(back) == list(adapter.tensors())
    for name, value in adapter.tensors().items():
        assert_same_bits(back[name], value, name)
    layers, experts, rank, hidden, width = SHAPE
    shapes = {name: (tuple(b.shape), tuple(a.shape)) for name, (b, a) in adapter.factors().items()}
    assert shapes == {
        **{f"experts.{n}.A1": ((experts, 2, width, rank), (experts, 2, rank, hidden)) for n in range(layers)},
        **{f"experts.{n}.A2": ((experts, 1, hidden, rank), (experts, 1, rank, width)) for n in range(layers)},
        "attention.layers.0.q_proj.A": ((1, OUT, rank), (1, rank, IN)),
    }


def test_experts_without_a_gate_are_cut_as_one_product() -> None:
    bank = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    up, down = torch.ones(2, 5, 3), torch.ones(2, 3, 5)
    adapter = Adapter({"0.A1": bank, "0.B1": up, "0.A2": down, "0.B2": torch.ones(2, 4, 3)}, {})
    cut = adapter.with_rank(2).experts
    assert torch.equal(cut["0.A1"], bank[:, :2]) and torch.equal(cut["0.B1"], up[:, :, :2])
