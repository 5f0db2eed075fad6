"""Sums under masks against the aggregation that sees every update, and what a part of a sum shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tests.random_rounds import LAYERS, RANK, K, an_adapter, an_update, half_only

from fedflame.config.words import Trainable
from fedflame.errors import InvalidMessage, UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.privacy.group_sums import contribution, group_update, length_of_sum
from fedflame.privacy.masks import masked
from fedflame.privacy.ring import BITS, LARGEST, from_ring, to_ring
from fedflame.privacy.sum_request import LONGEST, Member, SumRequest, given_digest
from fedflame.strategies import FedAvg, Flame
from fedflame.strategies.base import Strategy

seeds = st.integers(0, 2**32)
KEYS = [X25519PrivateKey.generate() for _ in range(6)]
RUN = "0" * 32


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def a_request(updates: Sequence[ClientUpdate], temperature: float = 1.0) -> SumRequest:
    members = [
        Member(name=f"site-{u.client}", rows=u.num_examples, key=public(KEYS[u.client]).hex(), signature="")
        for u in updates
    ]
    k = updates[0].active_experts
    return SumRequest(run=RUN, round=1, active_experts=k, given="", temperature=temperature, members=members)


def a_plan(start: Adapter, k: int, trainable: Trainable = "both") -> RoundPlan:
    rescalers = torch.ones(LAYERS)
    return RoundPlan(1, 0, 0, k, "learned", rescalers, start, 0.1, 0.0, 4, 10, trainable=trainable)


def masked_by(update: ClientUpdate, request: SumRequest, context: bytes | None = None) -> np.ndarray:
    name, own = f"site-{update.client}", KEYS[update.client]
    peers = {one.name: bytes.fromhex(one.key) for one in request.members if one.name != name}
    values = contribution(update, update.num_examples, request)
    return masked(values, name, own, peers, request.encoded() if context is None else context)


def summed(updates: Sequence[ClientUpdate], plan: RoundPlan, temperature: float) -> ClientUpdate:
    """What the hub makes of the masked answers of one group."""
    request = a_request(updates, temperature)
    total = np.zeros(length_of_sum(plan, request), np.uint32)
    for update in updates:
        total += masked_by(update, request)
    return group_update(total, request, updates[0], plan)


def two_groups(seed: int, trainable: Trainable = "both") -> tuple[Adapter, list[ClientUpdate]]:
    generator = torch.Generator().manual_seed(seed)
    start = an_adapter(generator)
    updates = [an_update(generator, client, 8 if client < 3 else 2) for client in range(6)]
    if trainable == "both":
        return start, updates
    return start, [
        replace(one, delta=half_only(one.delta, trainable), trainable=trainable) for one in updates
    ]


def assert_equal_but_for_rounding(
    strategy: Strategy, start: Adapter, updates: list[ClientUpdate], temperature: float
) -> None:
    """Both ways to aggregate; a value may differ by what rounding a sum to 2^-25 changes in the mean."""
    state = replace(strategy.initialize(start, (8, 2), LAYERS), trainable=updates[0].trainable)
    plain = strategy.aggregate_train(state, updates)
    groups = [
        summed(group, a_plan(start, group[0].active_experts, updates[0].trainable), temperature)
        for group in (updates[:3], updates[3:])
    ]
    found = strategy.aggregate_train(state, groups)
    for k in (8, 2):
        assert (found.rescalers[k] - plain.rescalers[k]).abs().max() < 1e-6
        for name, value in plain.adapter_at(k).tensors().items():
            other = found.adapter_at(k).tensors()[name]
            largest = max(float(u.delta.tensors()[name].abs().max()) for u in updates)
            weight = least_weight(updates, name, temperature)
            allowed = 3 * 2.0**-BITS * (1 + largest) / weight + 1e-5 * (largest + float(value.abs().max()))
            assert (value - other).abs().max() <= allowed, name


def least_weight(updates: Sequence[ClientUpdate], name: str, temperature: float) -> float:
    """The smallest weight in its group, relative to even use, of an expert that the group has used."""
    if not name.startswith("experts.") or not temperature:
        return 1.0
    found = []
    for group in (updates[:3], updates[3:]):
        rows = sum(update.num_examples for update in group)
        counts = [update.counts[int(name.split(".")[1])].double() / update.tokens for update in group]
        even = group[0].active_experts / len(counts[0])
        weights = sum(
            update.num_examples / rows * (share / even) ** temperature
            for update, share in zip(group, counts, strict=True)
        )
        found.append(float(weights[weights > 0].min()))
    return min(found)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_flame_makes_of_sums_what_it_makes_of_updates(temperature: float, seed: int) -> None:
    for normalization in ("token", "slot"):
        for affinity in (1.0, 0.7, 0.0):
            strategy = Flame(K, temperature, "learned", normalization, affinity)  # type: ignore[arg-type]
            assert_equal_but_for_rounding(strategy, *two_groups(seed), temperature)


@pytest.mark.parametrize("trainable", ["both", "A", "B"])
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_plain_means_are_the_same_and_a_frozen_half_does_not_travel(trainable: Trainable, seed: int) -> None:
    start, updates = two_groups(seed, trainable)
    assert_equal_but_for_rounding(FedAvg(8, RANK), start, updates, 0.0)
    plan, request = a_plan(start, 8, trainable), a_request(updates[:3], 0.0)
    values = sum(v.numel() for n, v in start.tensors().items() if trainable in ("both", n[-2], n[-1]))
    assert length_of_sum(plan, request) == len(masked_by(updates[0], request)) == 1 + LAYERS + values


@given(st.lists(st.floats(-LARGEST + 1e-3, LARGEST - 1e-3), min_size=1, max_size=30))
def test_the_ring_keeps_values_to_half_its_last_bit(values: list[float]) -> None:
    there = from_ring(to_ring(torch.tensor(values, dtype=torch.float64)))
    assert (there - torch.tensor(values, dtype=torch.float64)).abs().max() <= 2.0 ** -(BITS + 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, LARGEST, -LARGEST - 1e-3])
def test_a_value_that_the_ring_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(UserError, match="below 64"):
        to_ring(torch.tensor([0.0, value]))


def test_what_a_member_sends_and_the_sum_of_any_part_of_the_group_look_uniform() -> None:
    generator = torch.Generator().manual_seed(1)
    values = to_ring(0.01 * torch.randn(200_000, generator=generator))
    keys, names = KEYS[:4], [f"site-{i}" for i in range(4)]
    answers = []
    for name, own in zip(names, keys, strict=True):
        peers = {other: public(key) for other, key in zip(names, keys, strict=True) if other != name}
        answers.append(masked(values, name, own, peers, b"context"))
    for seen in (answers[0], answers[0] + answers[1], answers[0] + answers[1] + answers[2]):
        for shift in (0, 8, 16, 24):
            counts = np.bincount((seen >> np.uint32(shift)) & np.uint32(255), minlength=256)
            assert chisquare(counts).pvalue > 1e-6
    assert (sum(answers[1:], start=answers[0]) == values * np.uint32(4)).all()


def test_another_context_or_key_has_another_mask() -> None:
    zeros = np.zeros(4, np.uint32)
    seen = {
        masked(zeros, "a", KEYS[own], {"b": public(KEYS[peer])}, context).tobytes()
        for own, peer, context in ((0, 1, b"1"), (0, 1, b"2"), (0, 2, b"1"), (2, 1, b"1"))
    }
    assert len(seen) == 4
    again = masked(zeros, "a", KEYS[0], {"b": public(KEYS[1])}, b"1")
    assert (again + masked(zeros, "b", KEYS[1], {"a": public(KEYS[0])}, b"1") == 0).all()


def test_members_that_were_told_different_things_add_up_to_no_sum() -> None:
    start, updates = two_groups(3)
    plan, request = a_plan(start, 8), a_request(updates[:3])
    told = [request.encoded(), request.encoded(), request.encoded() + b" "]
    parts = [masked_by(one, request, context) for one, context in zip(updates[:3], told, strict=True)]
    with pytest.raises(InvalidMessage, match="do not cancel"):
        group_update(np.sum(parts, 0, dtype=np.uint32), request, updates[0], plan)
    with pytest.raises(InvalidMessage, match="do not cancel"):
        group_update(np.zeros(3, np.uint32), request, updates[0], plan)


def test_the_digest_of_what_is_given_is_equal_for_clients_and_differs_by_all_that_is_asked() -> None:
    plan = a_plan(two_groups(3)[0], 8)
    other = replace(plan, adapter=plan.adapter.combine(plan.adapter, torch.add))
    same = (plan, replace(plan, client=4), replace(plan, private_steps=3))
    changes: list[dict[str, Any]] = [
        {"round": 2}, {"active_experts": 4}, {"learning_rate": 0.0}, {"max_steps": 3}, {"batch_size": 1},
        {"rescaler_values": torch.zeros(LAYERS)}, {"merged": other.adapter}, {"clip_norm": 1.0},
    ]  # fmt: skip
    different = (plan, other, *(replace(plan, **change) for change in changes))
    assert len({given_digest(one) for one in same}) == 1
    assert len({given_digest(one) for one in different}) == len(different)


def test_a_request_comes_back_and_a_wrong_one_is_refused() -> None:
    request = a_request(two_groups(1)[1])
    assert SumRequest.decode(request.encoded()) == request
    assert request.rows == sum(member.rows for member in request.members)
    first, second, *_ = request.members
    for members in ([first], [first, first], [second, first], [first.model_copy(update={"rows": 0}), second]):
        with pytest.raises(InvalidMessage, match="sum"):
            SumRequest.decode(request.model_copy(update={"members": members}).encoded())
    with pytest.raises(InvalidMessage, match="at most"):
        SumRequest.decode(b" " * (LONGEST + 1))
