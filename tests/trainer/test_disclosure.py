"""Counts that are told roughly: their sums are right, who was used shows, and little else does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.message_samples import SHAPE, a_plan, an_update

from fedflame.messages import ClientUpdate
from fedflame.server.validation import validate_update
from fedflame.trainer.disclosure import disclosed
from fedflame.wire.codec import decode_update, encode_update

LAYERS, EXPERTS = SHAPE[:2]


@st.composite
def honest_counts(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Of tokens that each have two experts."""
    pair = st.lists(st.integers(0, EXPERTS - 1), min_size=2, max_size=2, unique=True)
    weights = st.integers(1, 10**6)
    layers = []
    tokens = draw(st.integers(1, 10**6))
    for _ in range(LAYERS):
        counts, left = [0] * EXPERTS, tokens
        while left:
            several = min(left, draw(weights))
            for expert in draw(pair):
                counts[expert] += several
            left -= several
        layers.append(counts)
    return tokens, layers


def update_with(tokens: int, counts: Any) -> ClientUpdate:
    update = an_update(counts=torch.tensor(counts))
    return replace(update, tokens=tokens, loss=1.2345, steps=25, trained_examples=1)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(honest_counts(), st.sampled_from(["rounded", "withheld"]))
def test_rough_counts_are_usable_and_show_who_was_used(
    honest: tuple[int, list[list[int]]], disclosure: Any
) -> None:
    tokens, counts = honest
    plan, update = replace(a_plan(), tokens_per_step=10**6), update_with(tokens, counts)
    validate_update(update, plan, 10**6)
    told = disclosed(update, disclosure)
    validate_update(told, plan, 10**6)
    assert torch.equal(told.counts > 0, update.counts > 0)
    assert told.counts.dtype == torch.int64 and disclosed(update, "exact") is update
    received = decode_update(encode_update(told, plan), plan)
    assert received.loss == told.loss and torch.equal(received.counts, told.counts)


@pytest.mark.parametrize(
    ("disclosure", "loss", "counts"),
    [
        ("exact", 1.2345, [[83, 17, 100, 0, 0], [0, 91, 9, 99, 1]]),
        ("rounded", 1.2, [[89, 11, 100, 0, 0], [0, 95, 10, 94, 1]]),
        ("withheld", None, [[67, 66, 67, 0, 0], [0, 50, 50, 50, 50]]),
    ],
)
def test_what_is_told_of_these_counts(disclosure: Any, loss: float | None, counts: list[list[int]]) -> None:
    update = update_with(100, [[83, 17, 100, 0, 0], [0, 91, 9, 99, 1]])
    told = disclosed(update, disclosure)
    assert (told.loss, told.counts.tolist()) == (loss, counts)


def test_two_sites_that_use_the_same_experts_tell_the_same_when_they_withhold() -> None:
    one = disclosed(update_with(100, [[83, 17, 100, 0, 0]] * 2), "withheld")
    other = disclosed(update_with(100, [[50, 70, 80, 0, 0]] * 2), "withheld")
    assert torch.equal(one.counts, other.counts) and one.loss is other.loss is None
