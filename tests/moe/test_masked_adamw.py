"""AdamW with a mask against torch's own, expert by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedflame.moe import masked_adamw as module
from fedflame.moe.masked_adamw import Moments, masked_adamw

EXPERTS, SHAPE = 5, (3, 4)


@pytest.fixture(params=["by slices, as on a CPU", "by the mask, as on a GPU"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "mask" in request.param:

        def by_mask(bank: Tensor, moments: Moments, *rest: Any) -> None:
            module._update_all(bank, moments.mean, moments.mean_square, moments.steps, *rest)

        monkeypatch.setattr(module, "_update_slices", by_mask)


def run(decay: float, steps: int = 6) -> tuple[Tensor, Moments, Tensor]:
    """Our bank and moments, and the bank of torch's AdamW with one parameter per expert."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(EXPERTS, *SHAPE, generator=generator)
    bank, theirs = start.clone(), [nn.Parameter(value.double()) for value in start]
    moments = Moments.of(bank)
    optimizers = [torch.optim.AdamW([value], lr=0.01, weight_decay=decay) for value in theirs]
    for step in range(steps):
        gradient = torch.randn(bank.shape, generator=generator)
        touched = torch.rand(EXPERTS, generator=generator) < 0.6
        touched[0] = False
        masked_adamw(bank, moments, gradient, touched, 0.01 / (1 + step), decay)
        for expert in touched.nonzero().flatten().tolist():
            theirs[expert].grad = gradient[expert].double()
            optimizers[expert].param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizers[expert].step()
    assert torch.equal(bank[0], start[0]) and not moments.mean[0].any() and moments.steps[0] == 0
    return bank, moments, torch.stack([value.detach() for value in theirs])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_every_expert_equals_torchs_adamw_on_that_expert_alone(decay: float) -> None:
    bank, moments, theirs = run(decay)
    torch.testing.assert_close(bank.double(), theirs, rtol=0, atol=1e-6)
    assert len(moments.steps.unique()) > 1, "experts take steps at different times"


def test_a_step_counts_as_a_change_of_the_bank() -> None:
    """By this the products know that they hold old values."""
    bank = torch.ones(2, *SHAPE)
    before = bank._version
    masked_adamw(bank, Moments.of(bank), torch.ones_like(bank), torch.tensor([True, False]), 0.01, 0.0)
    assert bank._version > before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e38])
def test_the_mask_decides_and_never_the_gradient(value: float) -> None:
    """The gradient of an expert without rows is undefined on some cards (pytorch issue 172439)."""
    bank = torch.ones(2, *SHAPE)
    moments, gradient = Moments.of(bank), torch.ones_like(bank)
    masked_adamw(bank, moments, gradient, torch.tensor([True, True]), 0.01, 0.1)
    before = [kept[1].clone() for kept in (bank, moments.mean, moments.mean_square, moments.steps)]
    gradient[1] = value
    masked_adamw(bank, moments, gradient, torch.tensor([True, False]), 0.01, 0.1)
    after = [kept[1] for kept in (bank, moments.mean, moments.mean_square, moments.steps)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert bank.isfinite().all()
