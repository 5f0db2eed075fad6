"""Which steps of a round are captured, and that a captured step reads its batch and is seen by others.

A card alone captures; here a graph is stood for by a call of the same step on the same places.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny_models import PAD, tiny_adapted
from tests.training.one_client import plan_for, rows
from torch import Tensor

from fedflame.data.batches import PlacedBatch, collate, round_up
from fedflame.data.encoding import EncodedRow
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.routed_rows import tokens_of_experts
from fedflame.training import captured
from fedflame.training.captured import WAITS, CapturedSteps, Step
from fedflame.training.fine_tune import fine_tune


class CalledGraph:
    """Runs the step anew on the place of its batch, as a graph does."""

    made: list[CalledGraph]
    pool = "one for all"

    def __init__(self, step: Step, batch: PlacedBatch, pool: object) -> None:
        assert pool == (self.pool if self.made else None)
        self._step, self._place = step, PlacedBatch._make(None if v is None else v.clone() for v in batch)
        self.replays, self.tokens = 0, batch.input_ids.numel()
        self.made.append(self)

    def replay(self, batch: PlacedBatch) -> Tensor:
        self.replays += 1
        for place, value in zip(self._place, batch, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        return self._step(self._place)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[CalledGraph]:
    CalledGraph.made = []
    monkeypatch.setattr(captured, "_Graph", CalledGraph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    return CalledGraph.made


def batch(*shape: int, seed: int = 0) -> PlacedBatch:
    ids = torch.randint(9, shape, generator=torch.Generator().manual_seed(seed))
    return PlacedBatch(ids, torch.ones_like(ids), ids[0], ids[0], None)


def test_the_third_step_of_the_same_sizes_is_captured_and_each_size_by_itself(
    graphs: list[CalledGraph],
) -> None:
    steps = CapturedSteps(lambda given: given.input_ids.sum().float(), [])
    long, short = (batch(2, 5, seed=n) for n in range(4)), (batch(1, 3, seed=n) for n in range(4))
    for number, pair in enumerate(zip(long, short, strict=True)):
        for one in pair:
            assert steps(one) == one.input_ids.sum(), "the batch that was given is the one that counts"
        assert len(graphs) == (2 if number >= 2 else 0)
    assert [graph.replays for graph in graphs] == [2, 2]


def test_steps_that_wait_are_never_captured(graphs: list[CalledGraph]) -> None:
    def waiting(given: PlacedBatch) -> Tensor:
        warnings.warn(f"called a {WAITS}", stacklevel=1)
        return given.input_ids.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = CapturedSteps(waiting, [])
        for _ in range(5):
            steps(batch(2, 5))
    assert not graphs


class Card:
    """A card of 1,000 bytes. A step takes 10 for each token, and so does its graph, while it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._last = 0
        self._graphs: weakref.WeakSet[CalledGraph] = weakref.WeakSet()
        monkeypatch.setattr(captured, "_Graph", self.graph)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self._last)
        monkeypatch.setattr(torch.cuda, "memory_reserved", self.held)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 - self.held(), 1000))

    def graph(self, step: Step, batch: PlacedBatch, pool: object) -> CalledGraph:
        graph = CalledGraph(step, batch, None)
        CalledGraph.made.clear()  # nothing but the steps holds it
        self._graphs.add(graph)
        return graph

    def held(self) -> int:
        return sum(10 * graph.tokens for graph in self._graphs)

    def step(self, given: PlacedBatch) -> Tensor:
        self._last = 10 * given.input_ids.numel()
        return given.input_ids.sum()


def test_graphs_give_way_to_a_step_that_would_find_too_little(
    graphs: list[CalledGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(monkeypatch)
    steps = CapturedSteps(card.step, [])
    small, large = batch(1, 40), batch(1, 80)
    for number in range(1, 4):
        steps(small)
        assert card.held() == (400 if number == 3 else 0)
    steps(batch(1, 60))
    assert card.held() == 400, "600 bytes are free"
    held = []
    for _ in range(4):
        for one in (large, small):
            steps(one)
            held.append(card.held())
    assert held == [0, 400, 0, 400, 0, 0, 0, 0], "the third time the graphs do not come back"


def test_the_changes_of_a_captured_step_are_counted(graphs: list[CalledGraph]) -> None:
    """`ExpertLoRA.written` would otherwise keep what it made of older values."""
    value = torch.zeros(2)
    steps = CapturedSteps(lambda given: given.input_ids.sum(), [value])
    seen = []
    for _ in range(5):
        steps(batch(2, 5))
        seen.append(value._version)
    assert seen[1] == 0 and seen[2] < seen[3] < seen[4]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rescaler": "fixed"},
        {"packed_length": 26, "batch_size": 2},
        {"padding_free": True},
    ],
    ids=str,
)
def test_a_round_of_captured_steps_trains_the_same(
    changes: dict[str, Any], graphs: list[CalledGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows have different lengths, and prompts: captured batches are filled up to few sizes."""
    plan = replace(plan_for(tiny_adapted(), **changes), max_steps=12)
    expected = fine_tune(tiny_adapted(), rows(11), plan, PAD)
    monkeypatch.setattr(AdaptedModel, "can_capture", True)
    found = fine_tune(tiny_adapted(), rows(11), plan, PAD)
    assert len(graphs) < 4 and sum(graph.replays for graph in graphs) > 4
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert torch.equal(found.counts, expected.counts) and found.tokens == expected.tokens
    for one, other in zip(found.delta.tensors().values(), expected.delta.tensors().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_what_fills_a_batch_up_counts_for_nothing() -> None:
    whole = collate([EncodedRow([5, 6, 7, 8, 9, 4, 3], 3, False), EncodedRow([7, 8, 9], 1, False)], PAD)
    placed = whole.in_few_sizes(torch.device("cpu"))
    assert placed.input_ids.shape == (2, 8) and placed.real_tokens is None
    assert placed.counted is not None and placed.weights is not None
    assert placed.counted.tolist() == [1] * 7 + [0] + [1] * 3 + [0] * 5
    assert placed.predictors.tolist() == [2, 3, 4, 5, 8, 9, 0, 0]
    assert placed.targets.tolist() == [8, 9, 4, 3, 8, 9, 0, 0]
    assert placed.weights.tolist() == [1] * 6 + [0] * 2
    losses = torch.tensor([1.0, 2, 3, 4, 5, 6, 70, 80], requires_grad=True)
    placed.mean(losses).backward()
    assert placed.mean(losses).item() == 3.5
    assert losses.grad is not None and losses.grad.tolist() == pytest.approx([1 / 6] * 6 + [0, 0])


def test_widths_are_rounded_up_by_an_eighth_at_most() -> None:
    widths = {round_up(width) for width in range(1, 1025)}
    assert all(width <= round_up(width) < width + max(8, width / 8) for width in range(1, 1025))
    assert len(widths) < 45 and {8, 64, 128, 512, 1024} <= widths


@given(
    chosen=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3, unique=True), min_size=1, max_size=9),
    data=st.data(),
)
def test_tokens_of_experts_are_those_that_count(chosen: list[list[int]], data: st.DataObject) -> None:
    counted = data.draw(st.lists(st.integers(0, 1), min_size=len(chosen), max_size=len(chosen)))
    expected = [sum(e in row for row, one in zip(chosen, counted, strict=True) if one) for e in range(5)]
    assert tokens_of_experts(torch.tensor(chosen), torch.tensor(counted), 5).tolist() == expected
