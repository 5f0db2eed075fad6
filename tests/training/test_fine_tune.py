"""A client's round: its loss, its steps by hand, and what the update says of them."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from tests.tiny_models import (
    EXPERTS,
    LAYERS,
    PAD,
    TOP_K,
    exact_token_losses,
    merged,
    random_adapter,
    router_logits,
    tiny_adapted,
    tiny_olmoe,
    with_active_experts,
)
from tests.training.one_client import LONGEST, deltas, plan_for, rows, train
from tests.training.rounds_by_hand import gradients_of_a_merged_model
from torch import Tensor

from fedflame.data.batches import collate, training_batches
from fedflame.errors import UserError
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.seeds import derive_seed
from fedflame.server.validation import validate_update
from fedflame.training.fine_tune import fine_tune
from fedflame.training.schedule import learning_rates
from fedflame.training.steps import training_steps
from fedflame.training.token_loss import token_losses

# The loss


@pytest.mark.parametrize("k", [1, TOP_K])
def test_the_loss_is_that_of_transformers_on_the_same_batch(k: int) -> None:
    adapted, batch = tiny_adapted(), collate(rows(5), PAD)
    adapted.load(adapted.initial_adapter(0), torch.ones(LAYERS))
    stock = with_active_experts(k)
    with torch.no_grad(), adapted.active_experts(k):
        ours, theirs = token_losses(adapted, batch), stock(**vars(batch)).loss
    assert len(ours) == sum(len(row.ids) - row.prompt_length for row in rows(5))
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-6, atol=0)


def test_token_losses_come_row_after_row_in_order() -> None:
    adapted, batch = tiny_adapted(), collate(rows(5), PAD)
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    with torch.no_grad():
        ours, exact = token_losses(adapted, batch), exact_token_losses(merged(adapted, tiny_olmoe()), batch)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


# One round of one client


@pytest.mark.parametrize("k", [1, 3])
def test_the_first_step_is_adamw_by_hand_on_the_gradients_of_a_merged_model(k: int) -> None:
    adapted, examples, rate, decay = tiny_adapted(), rows(4), 0.01, 0.1
    plan = plan_for(adapted, adapter=random_adapter(adapted), active_experts=k, max_steps=1)
    adapted.load(plan.adapter, plan.rescaler_values)
    gradients = gradients_of_a_merged_model(adapted, k, collate(examples, PAD))
    update = fine_tune(adapted, examples, plan, PAD)
    touched = update.counts > 0

    def step(name: str, value: Tensor, weight_decay: float) -> Tensor:
        gradient = gradients[name]
        return -rate * (gradient / (gradient.abs() + 1e-8) + weight_decay * value.double())

    for name, delta in update.delta.tensors().items():
        expected = step(name, plan.adapter.tensors()[name], decay)
        clear = gradients[name].abs() > 1e-5  # of smaller ones rounding may take the sign
        if name.startswith("experts."):
            layer = int(name.split(".")[1])
            expected = expected * touched[layer].view(-1, 1, 1)
            clear |= ~touched[layer].view(-1, 1, 1)
        assert clear[expected != 0].double().mean() > 0.7
        torch.testing.assert_close(delta[clear].double(), expected[clear], rtol=0, atol=2e-3 * rate)
    for layer, (old, new) in enumerate(zip(plan.rescaler_values, update.rescaler_values, strict=True)):
        assert float(new - old) == pytest.approx(float(step(f"s.{layer}", old, 0.0)), rel=1e-4)


def test_the_update_says_who_trained_what_on_how_much() -> None:
    adapted, examples, steps = tiny_adapted(), rows(10), []
    plan = plan_for(adapted, max_steps=6)
    update = fine_tune(adapted, examples, plan, PAD, steps.append)
    assert (update.round, update.client, update.active_experts) == (3, 5, 2)
    assert (update.num_examples, update.trained_examples, update.steps) == (10, 10, 6)
    tokens = sum(len(row.ids) for row in examples)
    assert sum(steps[:3]) == sum(steps[3:]) == tokens
    assert update.tokens == 2 * tokens
    assert update.counts.sum(1).tolist() == [update.tokens * 2] * LAYERS
    validate_update(update, plan, LONGEST)


@pytest.mark.parametrize(
    ("epochs", "accumulated", "max_steps", "steps"),
    [
        (1.0, 1, 9, 3),  # ten rows in batches of 4, 4 and 2
        (2.0, 1, 9, 6),
        (0.5, 1, 9, 2),
        (2.0, 4, 9, 2),  # four batches, then the two that are left
        (2.0, 1, 5, 5),
        (0.0, 2, 4, 4),
    ],
)
def test_epochs_are_passes_over_the_rows_in_at_most_the_steps_of_the_plan(
    epochs: float, accumulated: int, max_steps: int, steps: int
) -> None:
    adapted, examples, told = tiny_adapted(), rows(10), []
    changes = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulated, "max_steps": max_steps}
    plan = plan_for(adapted, **changes)
    update = fine_tune(adapted, examples, plan, PAD, told.append)
    assert update.steps == steps
    batches = training_batches(examples, plan.batch_size, PAD, derive_seed(11, "batches", 3, 5))
    whole = math.ceil(epochs * 3) if epochs else accumulated * max_steps
    expected = [batch.tokens for batch in islice(batches, min(whole, accumulated * max_steps))]
    assert told == expected
    assert update.tokens == sum(expected)
    validate_update(update, plan, LONGEST)


def test_each_step_has_the_rate_of_the_schedule() -> None:
    """Two steps as two rounds of one step with fresh moments would not give the same; so a step at a time."""
    adapted = tiny_adapted()
    falling = plan_for(adapted, max_steps=2, lr_scheduler_type="linear", warmup_rounds=4.0, weight_decay=0.0)
    rates = list(learning_rates(falling, 2))
    assert rates == pytest.approx([0.01 * 2.5 / 4, 0.01 * 0.5 * 3 / 4])
    adapted.load(falling.adapter, falling.rescaler_values)
    scalars = [lora.s for lora in adapted.loras]
    optimizer = ExpertAdamW(adapted.loras, adapted.attention.values(), 1.0, 0.0, scalars)
    step, examples = training_steps(adapted, optimizer), rows(10)
    batches = training_batches(examples, falling.batch_size, PAD, derive_seed(11, "batches", 3, 5))
    with adapted.training(2):
        for rate, batch in zip(rates, batches, strict=False):
            optimizer.set_learning_rate(rate)
            step(batch)
    expected, s = adapted.learned_since(falling.adapter).tensors(), adapted.rescaler_values()
    update = fine_tune(adapted, examples, falling, PAD)
    assert torch.equal(update.rescaler_values, s)
    assert all(torch.equal(value, expected[name]) for name, value in update.delta.tensors().items())


def test_the_norm_of_the_plan_is_that_of_the_step() -> None:
    adapted, examples = tiny_adapted(), rows(10)
    plans = [plan_for(adapted, max_grad_norm=norm) for norm in (0.0, 1e-9)]
    one, other = (float(deltas(fine_tune(adapted, examples, plan, PAD)).norm()) for plan in plans)
    assert other < 0.5 * one, "epsilon outweighs tiny gradients"


@pytest.mark.parametrize(("max_steps", "tokens_per_step"), [(1, 0), (2, 0), (3, 0), (7, 0), (2, 30), (9, 30)])
def test_every_row_that_was_trained_on_counts_once(max_steps: int, tokens_per_step: int) -> None:
    adapted, examples = tiny_adapted(), rows(10)
    plan = plan_for(adapted, max_steps=max_steps, tokens_per_step=tokens_per_step)
    update = fine_tune(adapted, examples, plan, PAD)
    seed = derive_seed(plan.seed, "batches", plan.round, plan.client)
    batches = training_batches(examples, plan.batch_size, PAD, seed, tokens_per_step)
    seen = {tuple(ids) for batch in islice(batches, max_steps) for ids in batch.input_ids.tolist()}
    distinct = {tuple(token for token in ids if token != PAD) for ids in seen}
    assert update.trained_examples == len(distinct) <= len(examples)
    validate_update(update, plan, LONGEST)


def test_counts_are_those_of_the_router_logits_over_one_epoch() -> None:
    adapted, examples, k = tiny_adapted(), rows(10), 2
    plan = plan_for(adapted, rescaler="fixed", rescaler_values=torch.ones(LAYERS), learning_rate=1e-12)
    update = fine_tune(adapted, examples, plan, PAD)
    batch = collate(examples, PAD)
    real = batch.attention_mask.flatten().bool()
    for layer, logits in enumerate(router_logits(with_active_experts(k), batch)):
        expected = torch.zeros(EXPERTS, dtype=torch.int64)
        for row in logits[real].tolist():
            expected[sorted(range(EXPERTS), key=lambda expert: -row[expert])[:k]] += 1
        assert update.counts[layer].tolist() == expected.tolist()


def test_the_reported_loss_is_the_mean_over_the_steps() -> None:
    adapted, examples = tiny_adapted(), rows(4)
    frozen = {"learning_rate": 1e-12, "rescaler": "fixed", "rescaler_values": torch.ones(LAYERS)}
    update = fine_tune(adapted, examples, plan_for(adapted, batch_size=3, max_steps=2, **frozen), PAD)
    stock = with_active_experts(2)
    # Two batches, of 3 rows and of 1: which row is alone is the seed's choice.
    splits = [
        (collate([row for row in examples if row is not alone], PAD), collate([alone], PAD))
        for alone in examples
    ]
    with torch.no_grad():
        means = [sum(stock(**vars(batch)).loss.item() for batch in split) / 2 for split in splits]
    assert min(abs(update.loss - mean) for mean in means) < 1e-5


@pytest.mark.slow
def test_the_loss_falls_on_a_task_that_can_be_learned_by_heart() -> None:
    adapted, examples = tiny_adapted(), rows(4)
    first = fine_tune(adapted, examples, plan_for(adapted, max_steps=1), PAD)
    trained = fine_tune(adapted, examples, plan_for(adapted, max_steps=60), PAD)
    learned = plan_for(adapted).adapter.combine(trained.delta, torch.add)
    again = plan_for(adapted, adapter=learned, rescaler_values=trained.rescaler_values, max_steps=1)
    last = fine_tune(adapted, examples, again, PAD)
    assert first.loss > 4
    assert last.loss < 0.2 * first.loss
    assert last.loss < trained.loss < first.loss


@pytest.mark.parametrize("rescaler", ["learned", "mass"])
@pytest.mark.parametrize("k", [0, TOP_K + 1])
def test_a_k_that_the_model_does_not_have_is_refused(rescaler: str, k: int) -> None:
    adapted = tiny_adapted()
    with pytest.raises(UserError) as caught:
        train(adapted, rows(3), active_experts=k, rescaler=rescaler)
    assert (
        str(caught.value) == f"active_experts {k}: must be between 1 and 4 (the model's num_experts_per_tok)"
    )
