"""Rescalers in a round: learned, fixed, or measured by the mass of the experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.tiny_models import LAYERS, PAD, TOP_K, random_adapter, random_batch, tiny_adapted
from tests.training.one_client import plan_for, rows
from tests.training.rounds_by_hand import exact_first_loss, mass_by_hand

from fedflame.data.batches import collate
from fedflame.training.fine_tune import MASS_BATCHES, fine_tune, measure_mass


@pytest.mark.parametrize("rescaler", ["learned", "fixed"])
def test_the_first_loss_uses_the_plans_k_adapter_and_rescalers(rescaler: str) -> None:
    adapted, examples = tiny_adapted(), rows(4)
    plan = plan_for(adapted, rescaler=rescaler, adapter=random_adapter(adapted), max_steps=1)
    expected = exact_first_loss(adapted, examples, plan, plan.rescaler_values)
    assert fine_tune(adapted, examples, plan, PAD).loss == pytest.approx(expected, rel=1e-6)


def test_learned_trains_every_rescaler_from_the_plans_value() -> None:
    adapted, start = tiny_adapted(), torch.tensor([0.9, 1.2])
    one_step = fine_tune(adapted, rows(9), plan_for(adapted, max_steps=1), PAD).rescaler_values
    assert (one_step - start).abs().tolist() == pytest.approx([0.01, 0.01], rel=1e-3)
    more = fine_tune(adapted, rows(9), plan_for(adapted, max_steps=8), PAD).rescaler_values
    assert not torch.isclose(more, one_step).any()


def test_fixed_keeps_the_plans_rescalers_bit_for_bit() -> None:
    adapted, start = tiny_adapted(), torch.tensor([0.9, 1.2])
    assert torch.equal(
        fine_tune(adapted, rows(9), plan_for(adapted, rescaler="fixed"), PAD).rescaler_values, start
    )


@pytest.mark.parametrize("k", [1, 2, TOP_K])
def test_measured_mass_is_that_of_the_router_logits_without_padding(k: int) -> None:
    adapted = tiny_adapted()
    adapted.load(adapted.initial_adapter(0), torch.ones(LAYERS))
    batches = [random_batch(seed, lengths=(12, 5, 3)) for seed in range(MASS_BATCHES)]
    ratio = measure_mass(adapted, iter([*batches, random_batch(99)]), k)
    expected = mass_by_hand(TOP_K, batches) / mass_by_hand(k, batches)
    torch.testing.assert_close(ratio.double(), expected, rtol=1e-5, atol=0)
    assert (k == TOP_K) == bool((ratio == 1).all())


def test_measuring_leaves_no_hook_no_count_and_the_models_own_k() -> None:
    adapted = tiny_adapted()
    measure_mass(adapted, iter([random_batch()]), 1)
    assert not any(layer.router._forward_hooks for layer in adapted.layers)
    assert [layer.router.top_k for layer in adapted.layers] == [TOP_K] * LAYERS
    assert not adapted.counts.total.any()


def test_mass_trains_with_the_measured_ratio_and_keeps_it() -> None:
    adapted, examples = tiny_adapted(), rows(4)
    plan = plan_for(adapted, rescaler="mass", rescaler_values=torch.ones(LAYERS), max_steps=1)
    whole = [collate(examples, PAD)]  # each of the measured batches holds all four rows
    expected = mass_by_hand(TOP_K, whole) / mass_by_hand(2, whole)
    one_step = fine_tune(adapted, examples, plan, PAD)
    torch.testing.assert_close(one_step.rescaler_values.double(), expected, rtol=1e-5, atol=0)
    assert one_step.loss == pytest.approx(exact_first_loss(adapted, examples, plan, expected), rel=1e-5)
    more = fine_tune(adapted, examples, replace(plan, max_steps=5), PAD)
    assert torch.equal(more.rescaler_values, one_step.rescaler_values)
    assert more.tokens == 5 * one_step.tokens == 5 * whole[0].tokens
