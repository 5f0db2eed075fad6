"""Several batches as one step, and the norm of its gradient: against one batch, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.tiny_models import EXPERTS, LAYERS, random_adapter, random_batch, tiny_adapted
from torch import Tensor, nn

from fedflame.data.batches import IGNORE_INDEX, Batch
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.training.regularizers import squared_distance
from fedflame.training.steps import training_steps
from fedflame.training.token_loss import token_losses

PAD = 0


def started(decay: float = 0.1, **options: Any) -> tuple[AdaptedModel, ExpertAdamW]:
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    adapted.counts.reset()
    scalars = [lora.s for lora in adapted.loras]
    return adapted, ExpertAdamW(adapted.loras, adapted.attention.values(), 0.01, decay, scalars, **options)


def apart(batch: Batch, *sizes: int) -> list[Batch]:
    """The rows of a batch in several."""
    values = (batch.input_ids, batch.attention_mask, batch.labels)
    parts = zip(*(value.split(sizes) for value in values), strict=True)
    return [Batch(*part) for part in parts]


def values_of(adapted: AdaptedModel) -> dict[str, Tensor]:
    return adapted.adapter().tensors() | {"s": adapted.rescaler_values()}


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 1, 1)])
def test_batches_that_are_added_up_take_the_step_of_one_batch(sizes: tuple[int, ...]) -> None:
    """Rows of unequal length, of which one predicts nothing but its end, so that means would differ."""
    whole = random_batch(3, (11, 7, 4))
    whole.labels[0, :-5] = IGNORE_INDEX
    taken, losses, counts = [], [], []
    for batches in ([whole], apart(whole, *sizes)):
        adapted, optimizer = started()
        step = training_steps(adapted, optimizer)
        for _ in range(3):
            losses.append(float(step(*batches)))
        taken.append(values_of(adapted))
        counts.append(adapted.counts.total)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert torch.equal(*counts)
    before = values_of(started()[0])
    for name, value in taken[0].items():
        torch.testing.assert_close(taken[1][name], value, rtol=0, atol=2e-5)
        assert not torch.equal(value, before[name])


def test_an_expert_that_only_an_early_batch_used_takes_the_step() -> None:
    adapted, optimizer = started()
    first, second = random_batch(0, (9,)), random_batch(1, (2,))
    used = []
    for batch in (first, second):
        adapted.counts.reset()
        with torch.no_grad():
            adapted.counts.begin_step(None)
            token_losses(adapted, batch.on(adapted.device))
            adapted.counts.end_step()
        used.append(adapted.counts.total.clone() > 0)
    before = adapted.adapter()
    training_steps(adapted, optimizer)(first, second)
    assert (used[0] & ~used[1]).any()
    for layer in range(LAYERS):
        moved = (adapted.loras[layer].B2.detach() != before.experts[f"{layer}.B2"]).flatten(1).any(1)
        assert torch.equal(moved, (used[0] | used[1])[layer])


def test_the_regularizer_counts_once_however_many_batches_there_are() -> None:
    batch, taken = random_batch(3, (11, 7, 4)), []
    for batches in ([batch], apart(batch, 1, 2)):
        adapted, optimizer = started()
        origin = Adapter.from_tensors(
            {name: torch.zeros_like(value) for name, value in adapted.adapter().tensors().items()}
        )
        step = training_steps(
            adapted, optimizer, lambda at=adapted, to=origin: squared_distance(at.attached(), to)
        )
        step(*batches)
        taken.append(values_of(adapted))
    for name, value in taken[0].items():
        torch.testing.assert_close(taken[1][name], value, rtol=0, atol=2e-5)


def test_after_each_batch_its_tokens_are_told_and_what_ends_there_leaves_nothing() -> None:
    adapted, optimizer = started()
    batches, told = [random_batch(0, (9,)), random_batch(1, (5, 2))], list[int]()
    training_steps(adapted, optimizer, on_step=told.append)(*batches)
    assert told == [9, 7]

    def refuse(tokens: int) -> None:
        raise RuntimeError("over time")

    before, counted = values_of(adapted), adapted.counts.total.clone()
    with pytest.raises(RuntimeError, match="over time"):
        training_steps(adapted, optimizer, on_step=refuse)(*batches)
    assert all(torch.equal(value, before[name]) for name, value in values_of(adapted).items())
    assert all(parameter.grad is None for parameter in adapted.model.parameters())
    assert int((adapted.counts.total - counted)[0].sum()) == 9 * adapted.num_experts_per_tok
    assert adapted.counts.real_tokens is None


# The norm of the gradient


def parameters_of(adapted: AdaptedModel) -> list[tuple[str, nn.Parameter]]:
    named = list(adapted.attached().tensors().items())
    return [*named, *((f"s.{lora.index}", lora.s) for lora in adapted.loras)]  # type: ignore[list-item]


def gradients_at(adapted: AdaptedModel, batch: Batch, extra: float) -> tuple[dict[str, Tensor], Tensor]:
    """By plain autograd, with a term that also pulls at experts that rest; and who was used."""
    adapted.counts.begin_step(batch.real_tokens)
    loss = token_losses(adapted, batch.on(adapted.device)).mean()
    used = adapted.counts.touched()
    adapted.counts.abandon_step()
    (loss + extra * pull(adapted)).backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in parameters_of(adapted)
        if parameter.grad is not None
    }
    adapted.model.zero_grad()
    for name, gradient in found.items():
        kind, layer, *_ = name.split(".")
        if kind == "experts":
            gradient[~used[int(layer)]] = 0
    return found, used


def pull(adapted: AdaptedModel) -> Tensor:
    return sum((value.square().sum() for value in adapted.attached().tensors().values()), torch.zeros(()))


def norm_of(gradients: Sequence[Tensor]) -> float:
    return sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5


@pytest.mark.parametrize("share", [0.1, 0.9, 3.0])
def test_a_gradient_above_the_norm_is_scaled_down_to_it_over_everything_that_is_trained(share: float) -> None:
    """One expert of each layer rests: what pulls at it is neither in the norm nor in the step."""
    batch, extra = random_batch(2, (3, 2)), 0.3
    plain, _ = started()
    with plain.active_experts(1):
        gradients, used = gradients_at(plain, batch, extra)
    assert not used.all() and used.shape == (LAYERS, EXPERTS)
    whole = norm_of(list(gradients.values()))
    adapted, optimizer = started(max_grad_norm=share * whole)
    seen: dict[str, Tensor] = {}
    step_bank, parameters = optimizer._step_bank, dict(parameters_of(adapted))

    def noted(number: int, touched: Tensor) -> None:
        seen.update({name: one.grad.clone() for name, one in parameters.items() if one.grad is not None})
        step_bank(number, touched)

    optimizer._step_bank = noted  # type: ignore[method-assign]
    with adapted.active_experts(1):
        training_steps(adapted, optimizer, lambda: extra * pull(adapted))(batch)
    assert seen.keys() == gradients.keys()
    factor = min(1.0, share)
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen[name], factor * gradient, rtol=1e-4, atol=1e-6 * whole)


def test_a_norm_that_no_gradient_reaches_changes_nothing() -> None:
    batch, taken = random_batch(0, (9, 4)), []
    for options in ({}, {"max_grad_norm": 1e6}):
        adapted, optimizer = started(**options)
        for _ in range(2):
            training_steps(adapted, optimizer)(batch)
        taken.append(values_of(adapted))
    assert all(torch.equal(value, taken[1][name]) for name, value in taken[0].items())


def test_a_rate_that_is_set_is_that_of_the_next_step_for_all_values() -> None:
    """The first step of AdamW moves every value by the rate, whatever its gradient is."""
    adapted, optimizer = started(decay=0.0)
    optimizer.set_learning_rate(0.0025)
    before = values_of(adapted)
    training_steps(adapted, optimizer)(random_batch(0, (9, 4)))
    for name, value in values_of(adapted).items():
        assert float((value - before[name]).abs().max()) == pytest.approx(0.0025, rel=1e-3)
