"""The codec bit for bit: what comes back is what was sent, and only what was learned travels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.message_samples import (
    IN,
    OUT,
    SHAPE,
    Shape,
    a_plan,
    adapter_of,
    an_update,
    assert_same_message,
    random_bits,
)
from tests.same_bits import assert_same_bits
from tests.wire.forged_messages import any_float, half_update, read_update, tensor_bytes, update_bytes
from torch import Tensor

from fedflame.messages import Adapter, half_of
from fedflame.wire.codec import decode_plan, decode_update, encode_plan, encode_update

shapes = st.permutations(range(1, 8)).map(lambda sizes: (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]))
seeds = st.integers(0, 2**32)


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
    merged = adapter_of((layers, experts, 11, hidden, width), random_bits, torch.Generator().manual_seed(4))
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
