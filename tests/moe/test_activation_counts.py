from __future__ import annotations

import pytest
import torch
from tests.tiny_models import (
    EXPERTS,
    LAYERS,
    PAD,
    TOP_K,
    random_batch,
    router_logits,
    tiny_adapted,
    with_active_experts,
)
from torch import Tensor

from fedflame.data.batches import Batch
from fedflame.moe.activation_counts import ActivationCounts
from fedflame.training.token_loss import token_losses


def hand_count(batch: Batch, k: int) -> list[list[int]]:
    """From the router logits of the stock model built with k: the k largest of every token."""
    mask = batch.attention_mask.reshape(-1).tolist()
    counts = []
    for logits in router_logits(with_active_experts(k), batch):
        layer = [0] * EXPERTS
        for row, real in zip(logits.tolist(), mask, strict=True):
            for expert in sorted(range(EXPERTS), key=lambda e: -row[e])[:k] if real else []:
                layer[expert] += 1
        counts.append(layer)
    return counts


def test_a_step_says_where_the_tokens_are_that_are_no_padding() -> None:
    counts = ActivationCounts(1, 2)
    assert counts.real_tokens is None
    counts.begin_step(real := torch.tensor([0, 1, 3]))
    assert counts.real_tokens is real
    counts.end_step()
    assert counts.real_tokens is None
    counts.begin_step(real)
    counts.abandon_step()
    assert counts.real_tokens is None


def test_a_second_record_of_a_layer_within_a_step_is_ignored() -> None:
    counts = ActivationCounts(1, 3)
    counts.begin_step(None)
    counts.record(0, torch.tensor([0, 1, 1]))
    counts.record(0, torch.tensor([2, 0, 0]))
    counts.end_step()
    assert counts.total.tolist() == [[0, 1, 1]]


def test_steps_add_up_and_touched_is_that_of_the_last_step() -> None:
    counts = ActivationCounts(1, 3)
    for per_expert in ([1, 1, 0], [0, 2, 0]):
        counts.begin_step(None)
        counts.record(0, torch.tensor(per_expert))
        within = counts.touched()
        touched = counts.end_step()
        assert torch.equal(within, touched)
    assert counts.total.tolist() == [[1, 3, 0]]
    assert touched.tolist() == [[False, True, False]]
    counts.reset()
    assert counts.total.tolist() == [[0, 0, 0]]


def test_nothing_is_counted_outside_a_step() -> None:
    counts = ActivationCounts(1, 3)
    counts.record(0, torch.tensor([1, 0, 0]))
    counts.begin_step(None)
    counts.end_step()
    counts.record(0, torch.tensor([1, 1, 0]))
    counts.begin_step(None)
    counts.abandon_step()
    counts.record(0, torch.tensor([1, 1, 0]))
    assert counts.total.tolist() == [[0, 0, 0]]


def test_a_layer_that_did_not_run_in_a_step_adds_nothing() -> None:
    counts = ActivationCounts(2, 3)
    counts.begin_step(None)
    counts.record(0, torch.tensor([0, 0, 1]))
    counts.end_step()
    counts.begin_step(None)
    counts.record(1, torch.tensor([0, 1, 0]))
    assert counts.end_step().tolist() == [[False] * 3, [False, True, False]]
    assert counts.total.tolist() == [[0, 0, 1], [0, 1, 0]]


def counted_step(k: int, checkpointing: bool = False) -> tuple[Tensor, list[int]]:
    """The counts of one training step, and how often the router of each layer ran."""
    adapted, batch, calls = tiny_adapted(), random_batch(), [0] * LAYERS
    if checkpointing:
        adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.model.train()

    def called(layer: int) -> None:
        calls[layer] += 1

    for index, layer in enumerate(adapted.layers):
        layer.router.register_forward_hook(lambda *_, index=index: called(index))
    with adapted.active_experts(k):
        adapted.counts.begin_step(batch.real_tokens)
        token_losses(adapted, batch).mean().backward()
        adapted.counts.end_step()
    return adapted.counts.total, calls


@pytest.mark.parametrize("k", [1, 2, TOP_K])
def test_a_training_step_counts_what_the_router_logits_say(k: int) -> None:
    batch = random_batch()
    assert PAD in batch.input_ids
    counts, _ = counted_step(k)
    assert counts.tolist() == hand_count(batch, k)
    assert counts.sum(1).tolist() == [batch.tokens * k] * LAYERS
    assert counts.dtype == torch.int64 and int(counts.max()) <= batch.tokens


def test_gradient_checkpointing_runs_the_routers_twice_and_counts_once() -> None:
    counts, calls = counted_step(2, checkpointing=True)
    assert calls == [2] * LAYERS
    assert counts.tolist() == hand_count(random_batch(), 2)


def test_evaluation_and_generation_count_nothing() -> None:
    adapted, batch = tiny_adapted(), random_batch()
    with torch.no_grad():
        token_losses(adapted, batch)
        adapted.model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=3, do_sample=False
        )
    assert not adapted.counts.total.any()
