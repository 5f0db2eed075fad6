"""A plan as what it adds to one that is held: the same bytes come out, and little travels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.message_samples import SHAPE, a_plan, an_adapter, assert_same_bits, random_bits, random_numbers

from fedflame.errors import InvalidMessage
from fedflame.messages import NOTHING, Adapter, RoundPlan
from fedflame.wire.addition import decode_addition, encode_addition, plan_digest
from fedflame.wire.buffer import unpack, views
from fedflame.wire.codec import decode_plan, encode_plan
from fedflame.wire.frame import opened


def moved(plan: RoundPlan, bank: str, expert: int) -> RoundPlan:
    """The plan with other bits in one expert's slice of one bank."""
    experts = {name: value.clone() for name, value in plan.adapter.experts.items()}
    experts[bank][expert] = -experts[bank][expert]
    return replace(plan, round=plan.round + 1, adapter=Adapter(experts, plan.adapter.attention))


def factors(rank: int, seed: int) -> Adapter:
    layers, experts, _, hidden, width = SHAPE
    generator = torch.Generator().manual_seed(seed)
    return an_adapter((layers, experts, rank, hidden, width), random_numbers, generator)


def travelled(plan: RoundPlan, held: RoundPlan) -> bytes:
    """The addition, once it has been seen to come back; the plan where there is none."""
    wanted, there = encode_plan(plan), encode_plan(held)
    message = encode_addition(wanted, there)
    if message is None:
        return wanted
    assert decode_addition(message, there) == wanted
    return message


def addition(plan: bytes, held: bytes) -> bytes:
    message = encode_addition(plan, held)
    assert message is not None
    return message


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32), st.booleans())
def test_any_plan_comes_back_to_the_byte_whatever_is_held(seed: int, other: int, same: bool) -> None:
    held = a_plan(seed=seed, values=random_bits)
    plan = replace(a_plan(seed=seed if same else other, values=random_bits), round=9)
    travelled(plan, held)


def test_views_of_a_packed_plan_are_its_values() -> None:
    plan = replace(a_plan(values=random_bits), merged=factors(2, 1))
    wanted, header = unpack(bytes(opened(encode_plan(plan))))
    for buffer in (opened(encode_plan(plan)), opened(memoryview(bytearray(encode_plan(plan))))):
        values, said = views(buffer)
        assert said == header and values.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_same_bits(values[name], value, name)


def test_of_what_did_not_change_nothing_travels() -> None:
    plan = a_plan((3, 40, 4, 30, 20))
    whole = len(encode_plan(plan))
    assert len(travelled(replace(plan, round=4), plan)) < whole / 20


def test_of_one_expert_that_changed_its_slice_travels() -> None:
    plan = a_plan((3, 40, 4, 30, 20))
    slice_bytes = 4 * plan.adapter.experts["1.B1"][7].numel()
    nothing = len(travelled(replace(plan, round=4), plan))
    one = len(travelled(moved(plan, "1.B1", 7), plan))
    assert slice_bytes <= one - nothing < slice_bytes + 300  # with its name, index and shape


def test_a_zero_that_changed_its_sign_travels() -> None:
    plan = a_plan()
    zero = {name: torch.zeros_like(value) for name, value in plan.adapter.experts.items()}
    held = replace(plan, adapter=Adapter(zero, plan.adapter.attention))
    travelled(moved(held, "0.A2", 3), held)


def test_of_merged_factors_that_grew_the_new_ranks_travel() -> None:
    first, second = factors(5, 1), factors(2, 2)
    held = a_plan()
    grown = replace(held, merged=first.concatenate(second))
    new = sum(4 * value.numel() for value in second.tensors().values())
    known = len(travelled(replace(held, merged=first), replace(held, merged=first)))
    assert new <= len(travelled(grown, replace(held, merged=first))) - known < new + 3000
    travelled(grown, held)
    travelled(held, grown)
    travelled(replace(held, merged=second.concatenate(first)), replace(held, merged=first))
    assert decode_plan(encode_plan(held)).merged == NOTHING


def test_an_adapter_of_another_rank_travels_whole() -> None:
    travelled(replace(a_plan(), adapter=factors(4, 3)), a_plan())


def test_of_a_plan_in_which_every_value_is_new_there_is_no_addition() -> None:
    held = a_plan()
    every = held.adapter.combine(held.adapter, lambda value, _: value + 1)
    plan = replace(held, adapter=every, rescaler_values=held.rescaler_values + 1)
    assert encode_addition(encode_plan(plan), encode_plan(held)) is None
    assert encode_addition(encode_plan(moved(plan, "0.A1", 0)), encode_plan(plan)) is not None


def test_against_another_plan_than_the_one_that_is_held_it_is_refused() -> None:
    held, other = encode_plan(a_plan()), encode_plan(a_plan(seed=5))
    message = addition(encode_plan(replace(a_plan(), round=4)), held)
    with pytest.raises(InvalidMessage, match="not an addition to the plan that is held"):
        decode_addition(message, other)
    with pytest.raises(InvalidMessage, match="not an addition"):
        decode_addition(held, held)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_addition_is_refused_under_a_new_seal_too(data: st.DataObject) -> None:
    from fedflame.wire.frame import seal, unseal

    held = encode_plan(a_plan())
    wanted = encode_plan(moved(a_plan(), "1.B2", 2))
    body = bytearray(unseal(addition(wanted, held)))
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] ^= data.draw(st.integers(1, 255))
    try:
        plan = decode_addition(seal(bytes(body)), held)
    except InvalidMessage:
        return
    assert plan == wanted  # padding, or a name of the header that is not read


def test_plans_have_different_digests() -> None:
    assert plan_digest(encode_plan(a_plan())) != plan_digest(encode_plan(a_plan(seed=5)))
