"""Rounds of rows that share a sequence, or that are not padded: as of the same rows each on its own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tests.tiny_models import LAYERS, PAD, TOP_K, VOCABULARY, tiny_adapted
from tests.training.one_client import LONGEST, plan_for, rows
from tests.training.rounds_by_hand import exact_first_loss, mass_by_hand

from fedflame.data.batches import collate
from fedflame.data.encoding import EncodedRow
from fedflame.server.validation import validate_update
from fedflame.training.fine_tune import fine_tune


def test_without_padding_a_client_learns_the_same() -> None:
    adapted, examples = tiny_adapted(), rows(9)
    plan = plan_for(adapted, max_steps=5)
    plain = fine_tune(adapted, examples, plan, PAD)
    free = fine_tune(adapted, examples, replace(plan, padding_free=True), PAD)
    for field in ("tokens", "trained_examples", "num_examples", "steps"):
        assert getattr(free, field) == getattr(plain, field), field
    assert torch.equal(free.counts, plain.counts)
    assert free.loss == pytest.approx(plain.loss, rel=1e-6)
    assert torch.allclose(free.rescaler_values, plain.rescaler_values, rtol=0, atol=1e-5)
    for name, delta in plain.delta.tensors().items():  # AdamW divides rounding by the root of its square, too
        torch.testing.assert_close(free.delta.tensors()[name], delta, rtol=0, atol=2e-4, msg=name)


def test_packed_rows_are_counted_as_rows_and_a_step_has_sequences() -> None:
    """Nine rows of ten tokens, three to a sequence of 34, two sequences to a step: an epoch is two steps."""
    adapted = tiny_adapted()
    draw = random.Random(1)
    examples = [EncodedRow([draw.randrange(3, VOCABULARY) for _ in range(10)], 2, False) for _ in range(9)]
    plan = plan_for(adapted, batch_size=2, packed_length=34, max_steps=1)
    for steps, few, most in ((1, 3, 6), (2, 9, 9), (3, 9, 9)):
        update = fine_tune(adapted, examples, replace(plan, max_steps=steps), PAD)
        assert few <= update.trained_examples <= most and update.num_examples == 9
        assert update.counts.sum(1).tolist() == [2 * update.tokens] * LAYERS
        validate_update(update, replace(plan, max_steps=steps), LONGEST)
        if steps == 2:
            assert update.tokens == 90


def test_the_first_loss_of_packed_rows_is_that_of_the_same_rows() -> None:
    adapted, examples = tiny_adapted(), rows(4)
    plan = plan_for(adapted, max_steps=1, batch_size=1, packed_length=100)
    update = fine_tune(adapted, examples, plan, PAD)
    expected = exact_first_loss(adapted, examples, plan, plan.rescaler_values)
    assert update.loss == pytest.approx(expected, rel=1e-5)


def test_the_mass_of_packed_rows_is_that_of_the_same_rows() -> None:
    adapted, examples = tiny_adapted(), rows(4)
    layout = {"batch_size": 1, "packed_length": 100}
    plan = plan_for(adapted, rescaler="mass", rescaler_values=torch.ones(LAYERS), max_steps=1, **layout)
    whole = [collate(examples, PAD)]
    expected = mass_by_hand(TOP_K, whole) / mass_by_hand(2, whole)
    found = fine_tune(adapted, examples, plan, PAD).rescaler_values
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
