from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from tests.random_rows import random_rows
from tests.tiny_models import (
    ALPHA,
    ATTENTION,
    LAYERS,
    PAD,
    RANK,
    TOP_K,
    VOCABULARY,
    WIDTH,
    random_batch,
    tiny_olmoe,
)
from torch import Tensor, nn

from fedflame.bench.measurement import saved_bytes
from fedflame.bench.methods import Pass
from fedflame.config.words import Checkpointed
from fedflame.data.batches import IGNORE_INDEX
from fedflame.errors import UserError
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.gradient_checkpointing import require_checkpointable
from fedflame.training.fine_tune import fine_tune
from fedflame.training.token_loss import token_losses


def adapted_model(checkpointing: Checkpointed) -> AdaptedModel:
    return AdaptedModel(tiny_olmoe(attention_dropout=0.4), RANK, ALPHA, ATTENTION, checkpointing)


def update(adapted: AdaptedModel, k: int) -> ClientUpdate:
    rows = random_rows((9, 8, 7, 6, 5), VOCABULARY, seed=3, prompt=3)
    plan = RoundPlan(
        round=1, client=0, seed=0, active_experts=k, rescaler="learned", rescaler_values=torch.ones(2),
        adapter=adapted.initial_adapter(0), learning_rate=0.01, weight_decay=0.1, batch_size=2, max_steps=3,
    )  # fmt: skip
    return fine_tune(adapted, rows, plan, PAD)


@pytest.mark.parametrize("k", [1, TOP_K])
@pytest.mark.parametrize("checkpointing", ["experts", "layers"])
def test_the_update_has_the_same_bits(checkpointing: Checkpointed, k: int) -> None:
    with_it, without = update(adapted_model(checkpointing), k), update(adapted_model("none"), k)
    for name, delta in without.delta.tensors().items():
        assert torch.equal(with_it.delta.tensors()[name], delta), name
    for field in fields(ClientUpdate):
        one, other = getattr(with_it, field.name), getattr(without, field.name)
        assert field.name == "delta" or (torch.equal(one, other) if isinstance(one, Tensor) else one == other)


def kept_for_backward(adapted: AdaptedModel) -> int:
    """Bytes that autograd keeps of the forward, parameters left out; the backward runs, too."""
    batch = random_batch(lengths=(40, 30))
    labelled = torch.ones(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()))
    one = Pass(lambda: token_losses(adapted, batch), labelled, {}, list(adapted.model.parameters()))
    with adapted.training(TOP_K):
        return saved_bytes(one)


def test_less_is_kept_for_the_backward() -> None:
    whole = kept_for_backward(adapted_model("none"))
    assert kept_for_backward(adapted_model("layers")) < 0.2 * whole


def test_of_checkpointed_experts_just_the_pre_activation_is_not_kept() -> None:
    """Gate and up of every routed row, in float32, on both layers."""
    rows = 2 * 40 * TOP_K
    saved = kept_for_backward(adapted_model("none")) - kept_for_backward(adapted_model("experts"))
    assert saved == LAYERS * rows * 2 * WIDTH * 4


def test_outside_of_training_nothing_of_it_is_left() -> None:
    adapted = adapted_model("layers")
    before = {name: module.training for name, module in adapted.model.named_modules()}
    update(adapted, 1)
    assert {name: module.training for name, module in adapted.model.named_modules()} == before
    ids = torch.arange(3, 8).view(1, 5)
    with torch.no_grad():
        generated = adapted.model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=True)
    assert generated.shape == (1, 8)


def test_a_model_without_such_layers_is_refused() -> None:
    match = "training.gradient_checkpointing: transformers checkpoints no layer of Linear"
    with pytest.raises(UserError, match=match):
        require_checkpointable(nn.Linear(2, 3))
