"""A round on a base in bfloat16 or float16: what float32 learns, also where float16 is too small for it."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import ALPHA, ATTENTION, LAYERS, PAD, random_adapter, tiny_olmoe
from tests.training.one_client import LONGEST, deltas, plan_for, rows, train
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.server.validation import validate_update
from fedflame.training.fine_tune import fine_tune


def adapted_in(dtype: torch.dtype, head: float = 1.0) -> AdaptedModel:
    """`tiny_adapted` with a base in this dtype, of weights that float16 holds, the head's times `head`."""
    model = tiny_olmoe(intermediate_size=40)  # rows of 16 bytes and more
    model.lm_head.weight.data *= head
    return AdaptedModel(model.half().to(dtype), 8, ALPHA, ATTENTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_half_precision_gives_a_valid_update(dtype: torch.dtype) -> None:
    adapted = adapted_in(dtype)
    plan = plan_for(adapted)
    update = fine_tune(adapted, rows(9), plan, PAD)
    validate_update(update, plan, LONGEST)
    assert all(delta.any() for delta in update.delta.tensors().values())


def test_float16_learns_what_float32_learns() -> None:
    """But for what grows out of single tokens that rounding routes elsewhere, others on each processor."""
    exact, half = (
        fine_tune(adapted, rows(9), plan_for(adapted, max_steps=10), PAD)
        for adapted in map(adapted_in, (torch.float32, torch.float16))
    )
    assert half.loss == pytest.approx(exact.loss, rel=2e-3)
    assert cosine_similarity(deltas(half), deltas(exact), 0) > 0.995
    torch.testing.assert_close(half.rescaler_values, exact.rescaler_values, rtol=5e-3, atol=0)


def test_gradients_too_small_for_float16_survive_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a head so weak, half of the gradients vanish in float16; AdamW would make full steps of them."""

    def one_step(dtype: torch.dtype) -> Tensor:
        adapted = adapted_in(dtype, head=1e-5)
        changes = {"adapter": random_adapter(adapted), "weight_decay": 0.0, "max_steps": 1}
        return deltas(fine_tune(adapted, rows(9), plan_for(adapted, **changes), PAD))

    exact, scaled = one_step(torch.float32), one_step(torch.float16)
    monkeypatch.setattr("fedflame.training.steps.LOSS_SCALE", 1.0)
    bare = one_step(torch.float16)
    moved = exact != 0
    assert (bare[moved] == 0).float().mean() > 0.4 and cosine_similarity(bare, exact, 0) < 0.8
    assert (scaled[moved] == 0).float().mean() < 0.01 and cosine_similarity(scaled, exact, 0) > 0.998


def test_a_step_whose_gradients_overflow_is_skipped_and_the_next_is_scaled_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first(steps: int) -> Tensor:
        adapted = adapted_in(torch.float16)
        plan = plan_for(adapted, max_steps=steps, weight_decay=0.5)
        update = fine_tune(adapted, rows(9), plan, PAD)
        validate_update(update, plan, LONGEST)  # refuses what is not finite
        assert update.steps == steps and update.counts.sum() == update.tokens * 2 * LAYERS
        return deltas(update)

    monkeypatch.setattr("fedflame.training.steps.LOSS_SCALE", 2.0**24)
    assert not first(1).any()
    assert first(20).any()


def test_activations_that_overflow_are_one_line_and_leave_the_model_as_it_was() -> None:
    alone, adapted = train(adapted_in(torch.float16), rows(9)), adapted_in(torch.float16)
    up = adapted.layers[0].experts.get_parameter("gate_up_proj")
    before = up.detach().clone()
    up.data.fill_(6e4)
    with pytest.raises(UserError) as caught:
        train(adapted, rows(7, seed=1), client=4)
    assert str(caught.value) == (
        "the loss is nan in float16, whose largest number is 65504; try model.dtype=bfloat16 or float32"
    )
    up.data.copy_(before)
    assert train(adapted, rows(9)) == alone
