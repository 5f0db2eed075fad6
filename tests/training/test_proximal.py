"""FedProx: the term is autograd's, and holds a client near where it began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.tiny_models import PAD, random_adapter, tiny_adapted
from tests.training.one_client import plan_for, rows, train
from torch import Tensor

from fedflame.data.batches import Batch
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.fine_tune import fine_tune
from fedflame.training.token_loss import token_losses


@pytest.mark.parametrize("trainable", ["both", "B"])
def test_the_proximal_term_is_autograds_of_the_penalised_loss(trainable: str) -> None:
    """The same rounds with mu/2 ||w - w_0||^2 in the loss itself."""
    mu, adapted, examples = 3.0, tiny_adapted(), rows(9)
    plan = plan_for(adapted, adapter=random_adapter(adapted), trainable=trainable, proximal_mu=mu)
    update = fine_tune(adapted, examples, plan, PAD)
    start, losses = plan.adapter.tensors(), []

    def penalised(adapted: AdaptedModel, batch: Batch) -> Tensor:
        loss = token_losses(adapted, batch)
        losses.append(float(loss.detach().mean()))
        distance = sum(
            ((value - start[name]) ** 2).sum() for name, value in adapted.attached().tensors().items()
        )
        return loss + mu / 2 * distance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedflame.training.steps.token_losses", penalised)
        wanted = fine_tune(adapted, examples, replace(plan, proximal_mu=0.0), PAD)
    for name, delta in wanted.delta.tensors().items():
        torch.testing.assert_close(update.delta.tensors()[name], delta, rtol=1e-3, atol=1e-5, msg=name)
    assert update.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert torch.allclose(update.rescaler_values, wanted.rescaler_values, rtol=0, atol=1e-5)


def test_the_larger_mu_the_nearer_the_client_stays_and_zero_is_plain_training() -> None:
    adapted, examples = tiny_adapted(), rows(9)

    def distance(mu: float) -> float:
        delta = fine_tune(adapted, examples, plan_for(adapted, proximal_mu=mu, max_steps=8), PAD).delta
        return sum(float((value**2).sum()) for value in delta.tensors().values())

    assert distance(0.0) > 1.1 * distance(0.1) > 1.2 * distance(10.0)
    assert train(adapted, examples) == train(adapted, examples, proximal_mu=0.0)
