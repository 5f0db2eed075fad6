from __future__ import annotations

import pytest
import torch
from tests.tiny_models import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    exact_token_losses,
    merged,
    random_adapter,
    random_batch,
    tiny_adapted,
    with_active_experts,
)
from torch import Tensor

from fedflame.moe.rescaler import mass_ratio, rescale
from fedflame.training.token_loss import token_losses


def routed_output(s: float | Tensor) -> Tensor:
    """The output of layer 0's experts for fixed inputs, with s in the model."""
    generator = torch.Generator().manual_seed(1)
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.tensor([float(s), 1.0]))
    x = torch.randn(9, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(9)])
    return adapted.layers[0].experts(x, index, torch.rand(9, 2, generator=generator))


def test_every_weight_is_multiplied_by_s() -> None:
    weights = torch.tensor([[0.5, 0.25], [0.75, 0.125]])
    assert rescale(weights, torch.tensor(1.5)).tolist() == [[0.75, 0.375], [1.125, 0.1875]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_s_of_one_leaves_the_bits_and_the_dtype(dtype: torch.dtype) -> None:
    weights = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    rescaled = rescale(weights, torch.tensor(1.0))
    assert rescaled.dtype == dtype
    assert torch.equal(rescaled, weights)


def test_the_routed_output_is_scaled_exactly() -> None:
    once = routed_output(1.0)
    assert once.abs().max() > 0.1
    for power_of_two in (0.25, 2.0, -4.0):
        assert torch.equal(routed_output(power_of_two), power_of_two * once)
    torch.testing.assert_close(routed_output(1.7), 1.7 * once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_the_gradient_of_s_equals_the_finite_difference_of_the_loss(k: int) -> None:
    adapted, batch, at, step = tiny_adapted(), random_batch(), torch.tensor([0.8, 1.4]), 1e-3
    adapter = random_adapter(adapted)
    adapted.load(adapter, at)
    with adapted.active_experts(k):
        token_losses(adapted, batch).mean().backward()
    gradients = [lora.s.grad.item() for lora in adapted.loras]

    def exact_loss(values: Tensor) -> float:
        """Of the stock model in float64 with s folded into its weights."""
        adapted.load(adapter, torch.ones(LAYERS))
        oracle = merged(adapted, with_active_experts(k))
        for layer, s in zip(oracle.model.layers, values, strict=True):
            layer.mlp.experts.down_proj.data *= s
        with torch.no_grad():
            return exact_token_losses(oracle, batch).mean().item()

    for layer, gradient in enumerate(gradients):
        offset = torch.zeros(LAYERS, dtype=torch.float64)
        offset[layer] = step
        slope = (exact_loss(at.double() + offset) - exact_loss(at.double() - offset)) / (2 * step)
        assert abs(slope) > 5e-3
        # transformers rounds norms and routing to float32: 1e-7 in the loss, over the step.
        assert gradient == pytest.approx(slope, abs=5e-5)


def test_mass_ratio_is_the_mass_at_full_k_over_the_mass_at_k() -> None:
    assert mass_ratio(torch.tensor([0.9, 0.6]), torch.tensor([0.45, 0.4])).tolist() == pytest.approx(
        [2.0, 1.5]
    )
