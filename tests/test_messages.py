"""The arithmetic of adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.message_samples import IN, OUT, SHAPE, a_plan, adapter_of, of_rank, random_bits, random_numbers
from tests.same_bits import assert_same_bits
from torch import Tensor

from fedflame.config.load import load_config
from fedflame.messages import NOTHING, Adapter, RoundPlan, half_of


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
    one = adapter_of(SHAPE, random_numbers, torch.Generator().manual_seed(1))
    other = adapter_of((layers, experts, 5, hidden, width), random_numbers, torch.Generator().manual_seed(2))
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
    adapters = [of_rank(rank, seed=rank) for rank in (2, 1, 4)]
    all_of = adapters[0].concatenate(NOTHING, *adapters[1:])
    assert all_of.rank == 7
    for name, value in low_rank_products(all_of).items():
        wanted = sum(low_rank_products(adapter)[name] for adapter in adapters)
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    in_pairs = adapters[0].concatenate(adapters[1]).concatenate(adapters[2])
    assert all(torch.equal(value, all_of.tensors()[name]) for name, value in in_pairs.tensors().items())


# Ranks


seeds = st.integers(0, 2**32)
ranks = st.integers(1, 9)


@settings(deadline=None)
@given(ranks, ranks, seeds)
def test_the_first_ranks_are_those_of_every_product_by_hand(rank: int, wanted: int, seed: int) -> None:
    adapter = of_rank(rank, seed)
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
    adapter = of_rank(rank, seed)
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
    adapter = of_rank(9)
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


@pytest.mark.parametrize(
    ("changes", "held"),
    [({}, False), ({"gradient_accumulation_steps": 2}, True), ({"max_grad_norm": 0.5}, True)],
)
def test_gradients_of_all_layers_exist_where_they_are_added_up_or_clipped(
    changes: dict[str, Any], held: bool
) -> None:
    plain = replace(a_plan(), gradient_accumulation_steps=1, max_grad_norm=0.0)
    assert replace(plain, **changes).holds_gradients == held
    training = load_config(None, [f"training.{key}={value}" for key, value in changes.items()]).training
    assert training.holds_gradients == held


def test_a_private_plan_computes_few_tokens_at_once_however_many_rows_a_step_has() -> None:
    plan = RoundPlan(1, 0, 0, 2, "fixed", torch.ones(1), NOTHING, 0.01, 0.0, batch_size=512, max_steps=3)
    private = replace(plan, clip_norm=1.0)
    ghost = replace(private, clipping="ghost")
    assert [one.largest_batch(100) for one in (plan, private, ghost)] == [51_200, 100, 2048]
    assert ghost.largest_batch(5000) == 5000
    assert {one.most_tokens(3, 100) for one in (plan, private, ghost)} == {3 * 51_200}
    assert private.holds_gradients and not plan.holds_gradients
