"""A plan as what it adds to one that is held: the same bytes come out, and little travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.message_samples import SHAPE, a_plan, of_rank, random_bits
from tests.same_bits import assert_same_bits
from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import NOTHING, Adapter, RoundPlan
from fedflame.wire.addition import decode_addition, encode_addition, plan_digest
from fedflame.wire.buffer import pack, unpack, views
from fedflame.wire.codec import decode_plan, encode_plan
from fedflame.wire.frame import opened, seal, unseal


def moved(plan: RoundPlan, bank: str, expert: int) -> RoundPlan:
    """The plan with other bits in one expert's slice of one bank."""
    experts = {name: value.clone() for name, value in plan.adapter.experts.items()}
    experts[bank][expert] = -experts[bank][expert]
    return replace(plan, round=plan.round + 1, adapter=Adapter(experts, plan.adapter.attention))


def travelled(plan: RoundPlan, held: RoundPlan) -> bytes:
    """The addition, once it has been seen to come back; the plan where there is none."""
    wanted, there = encode_plan(plan), encode_plan(held)
    message = encode_addition(wanted, there)
    if message is None:
        return wanted
    assert decode_addition(message, there) == wanted
    return message


def parts_of(message: bytes) -> dict[str, Tensor]:
    """The values that travel."""
    return unpack(unseal(message))[0]


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
    plan = replace(a_plan(values=random_bits), merged=of_rank(2, 1))
    wanted, header = unpack(bytes(opened(encode_plan(plan))))
    for buffer in (opened(encode_plan(plan)), opened(memoryview(bytearray(encode_plan(plan))))):
        values, said = views(buffer)
        assert said == header and values.keys() == wanted.keys()
        for name, value in wanted.items():
            assert_same_bits(values[name], value, name)


def test_views_are_of_the_buffer_where_it_can_be_written() -> None:
    buffer = memoryview(bytearray(pack({"x": torch.ones(2, 3), "none": torch.ones(0, 3)}, {})))
    values, _ = views(buffer)
    buffer[len(buffer) - 24 :] = torch.full((6,), 7.0).numpy().tobytes()
    assert values["x"].tolist() == [[7.0] * 3] * 2 and values["none"].shape == (0, 3)


def test_of_what_did_not_change_nothing_travels() -> None:
    plan = a_plan((3, 40, 4, 30, 20))
    message = travelled(replace(plan, round=4), plan)
    assert parts_of(message) == {} and len(message) < len(encode_plan(plan)) / 20


def test_of_one_expert_that_changed_its_slice_travels() -> None:
    plan = a_plan((3, 40, 4, 30, 20))
    slice_bytes = 4 * plan.adapter.experts["1.B1"][7].numel()
    nothing = len(travelled(replace(plan, round=4), plan))
    one = len(travelled(moved(plan, "1.B1", 7), plan))
    assert slice_bytes <= one - nothing < slice_bytes + 300  # with its name, index and shape


def test_of_a_bank_that_changed_everywhere_no_index_travels() -> None:
    plan = a_plan()
    turned = plan
    for expert in range(SHAPE[1]):
        turned = moved(turned, "1.B1", expert)
    assert set(parts_of(travelled(turned, plan))) == {"experts.1.B1"}


def test_a_value_that_is_not_held_travels_and_one_that_is_no_longer_wanted_is_refused() -> None:
    plan = a_plan()
    bare = replace(plan, adapter=Adapter(plan.adapter.experts, {}))
    assert set(parts_of(travelled(replace(plan, round=4), bare))) == set(plan.adapter.tensors()) - set(
        bare.adapter.tensors()
    )
    with pytest.raises(InvalidMessage, match="do not give the plan that was sent"):
        travelled(bare, plan)


def test_a_zero_that_changed_its_sign_travels() -> None:
    plan = a_plan()
    zero = {name: torch.zeros_like(value) for name, value in plan.adapter.experts.items()}
    held = replace(plan, adapter=Adapter(zero, plan.adapter.attention))
    travelled(moved(held, "0.A2", 3), held)


def test_of_merged_factors_that_grew_the_new_ranks_travel() -> None:
    first, second = of_rank(5, 1), of_rank(2, 2)
    held = a_plan()
    grown = replace(held, merged=first.concatenate(second))
    parts = parts_of(travelled(grown, replace(held, merged=first)))
    assert parts.keys() == second.tensors("merged.").keys()
    for name, value in second.tensors("merged.").items():
        assert_same_bits(parts[name], value, name)
    assert parts_of(travelled(replace(grown, round=9), grown)) == {}
    travelled(grown, held)
    travelled(held, grown)
    travelled(replace(held, merged=second.concatenate(first)), replace(held, merged=first))
    assert decode_plan(encode_plan(held)).merged == NOTHING


def test_merged_factors_of_fewer_ranks_or_other_names_travel_whole() -> None:
    held, merged = a_plan(), of_rank(2, 1)
    longer = merged.with_rank(5)  # the ranks that are gone were zero: what is left begins alike
    experts_alone = Adapter(merged.experts, {})
    for wanted, there in ((merged, longer), (experts_alone, merged), (merged, experts_alone)):
        message = travelled(replace(held, merged=wanted), replace(held, merged=there))
        assert parts_of(message).keys() == wanted.tensors("merged.").keys()


def test_an_adapter_of_another_rank_travels_whole() -> None:
    travelled(replace(a_plan(), adapter=of_rank(4, 3)), a_plan())


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


def no_downs(parts: dict[str, Tensor], about: dict[str, Any]) -> None:
    for name in [name for name in parts if name.endswith("A2")]:
        del parts[name]


FORGED: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]] = {
    "another kind": lambda parts, about: about.update(kind="plan"),
    "another plan's": lambda parts, about: about.update(held="0" * 64),
    "another result": lambda parts, about: about.update(plan="0" * 64),
    "no header of the plan": lambda parts, about: about.pop("header"),
    "no word of merged ranks": lambda parts, about: about.pop("kept_merged_rank"),
    "merged ranks that are not kept": lambda parts, about: about.update(kept_merged_rank=0),
    "rows without their values": lambda parts, about: parts.update({"x@rows": torch.tensor([0])}),
    "rows of a value that is not held": lambda parts, about: parts.update(
        {"x": torch.ones(1, 2), "x@rows": torch.tensor([0])}
    ),
    "rows that there are not": lambda parts, about: parts.update({"experts.1.B2@rows": torch.tensor([9])}),
    "rows of another shape": lambda parts, about: parts.update({"experts.1.B2": torch.ones(1, 2, 2)}),
    "more rows than values": lambda parts, about: parts.update({"experts.1.B2@rows": torch.arange(3)}),
    "merged factors without a rank": no_downs,
    "merged factors of one dimension": lambda parts, about: parts.update(
        {"merged.experts.0.A2": torch.ones(3)}
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_an_addition_that_does_not_fit_is_refused(kind: str) -> None:
    first = of_rank(5, 1)
    held = replace(a_plan(), merged=first)
    plan = replace(moved(held, "1.B2", 2), merged=first.concatenate(of_rank(2, 2)))
    parts, about = unpack(unseal(addition(encode_plan(plan), encode_plan(held))))
    FORGED[kind](parts, about)
    with pytest.raises(InvalidMessage):
        decode_addition(seal(pack(parts, about)), encode_plan(held))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_addition_is_refused_under_a_new_seal_too(data: st.DataObject) -> None:
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
    assert plan_digest(b"") == ""
    assert plan_digest(encode_plan(a_plan())) != plan_digest(encode_plan(a_plan(seed=5)))
