from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import (
    ALPHA,
    ATTENTION,
    EXPERTS,
    LAYERS,
    PAD,
    RANK,
    TOP_K,
    VOCABULARY,
    WIDTH,
    exact_token_losses,
    forbid_expert,
    merged,
    random_adapter,
    random_batch,
    router_logits,
    tiny_adapted,
    tiny_olmoe,
    with_active_experts,
)
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.model_shape import read_model_shape
from fedflame.data.batches import Batch, collate, training_batches
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.messages import ClientUpdate, RoundPlan, half_of
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.seeds import derive_seed
from fedflame.server.validation import validate_update
from fedflame.training.fine_tune import MASS_BATCHES, fine_tune, measure_mass
from fedflame.training.schedule import learning_rates
from fedflame.training.steps import training_steps
from fedflame.training.token_loss import token_losses
from fedflame.wire.codec import encode_update

LONGEST = 16
"""Tokens that no row has more of."""


def rows(count: int, seed: int = 0) -> list[EncodedRow]:
    """Random rows of 6 to 13 tokens, a third of them prompt or so."""
    draw = random.Random(seed)
    lengths = [draw.randint(6, 13) for _ in range(count)]
    return [
        EncodedRow([draw.randrange(3, VOCABULARY) for _ in range(n)], draw.randint(1, 4), False)
        for n in lengths
    ]


def plan_for(adapted: AdaptedModel, **changes: Any) -> RoundPlan:
    plan = RoundPlan(
        round=3,
        client=5,
        seed=11,
        active_experts=2,
        rescaler="learned",
        rescaler_values=torch.tensor([0.9, 1.2]),
        adapter=adapted.initial_adapter(0),
        learning_rate=0.01,
        weight_decay=0.1,
        batch_size=4,
        max_steps=3,
    )
    return replace(plan, **changes)


def train(adapted: AdaptedModel, examples: list[EncodedRow], **changes: Any) -> bytes:
    plan = plan_for(adapted, **changes)
    return encode_update(fine_tune(adapted, examples, plan, PAD), plan)


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


def gradients_of_a_merged_model(adapted: AdaptedModel, k: int, batch: Batch) -> dict[str, Tensor]:
    """Of every LoRA value and s by the chain rule, from the stock model in float64."""
    oracle = merged(adapted, with_active_experts(k))
    exact_token_losses(oracle, batch).mean().backward()
    scaling, adapter, gradients = adapted.loras[0].scaling, adapted.adapter(), {}
    for layer, s in enumerate(adapted.rescaler_values().double()):
        a1, b1, a2, b2 = (adapter.experts[f"{layer}.{bank}"].double() for bank in ("A1", "B1", "A2", "B2"))
        experts = oracle.model.layers[layer].mlp.experts
        halves = zip(a1.chunk(2, 1), b1.chunk(2, 1), experts.gate_up_proj.grad.chunk(2, 1), strict=True)
        down = s * experts.down_proj.grad
        pairs = [(scaling * b.mT @ w, scaling * w @ a.mT) for a, b, w in halves]
        gradients[f"experts.{layer}.A1"] = torch.cat([a for a, _ in pairs], 1)
        gradients[f"experts.{layer}.B1"] = torch.cat([b for _, b in pairs], 1)
        gradients[f"experts.{layer}.A2"] = scaling * b2.mT @ down
        gradients[f"experts.{layer}.B2"] = scaling * down @ a2.mT
        gradients[f"s.{layer}"] = (experts.down_proj.grad * experts.down_proj).sum().detach() / s
    for name in adapter.attention:
        module, part = name.rsplit(".", 1)
        weight = oracle.get_parameter(f"{module}.weight").grad
        a, b = (adapter.attention[f"{module}.{other}"].double() for other in "AB")
        gradients[f"attention.{name}"] = scaling * (b.mT @ weight if part == "A" else weight @ a.mT)
    return gradients


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


@pytest.mark.parametrize("trainable", ["A", "B"])
def test_a_frozen_half_stays_and_the_other_takes_the_step_it_takes_with_both(trainable: str) -> None:
    adapted = tiny_adapted()
    plan = plan_for(adapted, adapter=random_adapter(adapted), max_steps=1)
    both = fine_tune(adapted, rows(9), plan, PAD).delta.tensors()
    update = fine_tune(adapted, rows(9), replace(plan, trainable=trainable), PAD)
    assert update.trainable == trainable
    for name, delta in update.delta.tensors().items():
        wanted = both[name] if half_of(name) == trainable else torch.zeros_like(delta)
        assert torch.equal(delta, wanted)
    more = fine_tune(adapted, rows(9), replace(plan, trainable=trainable, max_steps=4), PAD)
    for name, delta in more.delta.tensors().items():
        assert bool(delta.any()) == (half_of(name) == trainable)


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


def test_an_expert_that_was_never_activated_has_a_delta_of_exactly_zero() -> None:
    adapted, forbidden = tiny_adapted(), 3
    forbid_expert(adapted, forbidden)
    changes = {"active_experts": 1, "adapter": random_adapter(adapted), "weight_decay": 0.5, "max_steps": 8}
    update = fine_tune(adapted, rows(9), plan_for(adapted, **changes), PAD)
    assert update.counts[:, forbidden].tolist() == [0] * LAYERS
    for name, delta in update.delta.experts.items():
        used = update.counts[int(name.split(".")[0])] > 0
        assert delta.flatten(1).any(1).tolist() == used.tolist()


def test_the_base_model_its_routers_and_its_k_are_as_before() -> None:
    adapted = tiny_adapted()
    mine = {id(p) for lora in adapted.loras for p in lora.parameters()} | {
        id(p) for p in adapted.attention.values()
    }
    base = {name: p for name, p in adapted.model.named_parameters() if id(p) not in mine}
    before = {name: p.detach().clone() for name, p in base.items()}
    for rescaler in ("learned", "mass"):
        train(adapted, rows(9), active_experts=1, rescaler=rescaler)
    assert {"model.layers.0.mlp.gate.weight", "model.embed_tokens.weight", "lm_head.weight"} <= base.keys()
    assert all(torch.equal(base[name], value) for name, value in before.items())
    assert [layer.router.top_k for layer in adapted.layers] == [TOP_K] * LAYERS


@pytest.mark.parametrize("rescaler", ["learned", "mass"])
@pytest.mark.parametrize("k", [0, TOP_K + 1])
def test_a_k_that_the_model_does_not_have_is_refused(rescaler: str, k: int) -> None:
    adapted = tiny_adapted()
    with pytest.raises(UserError) as caught:
        train(adapted, rows(3), active_experts=k, rescaler=rescaler)
    assert (
        str(caught.value) == f"active_experts {k}: must be between 1 and 4 (the model's num_experts_per_tok)"
    )


def adapted_in(dtype: torch.dtype, head: float = 1.0) -> AdaptedModel:
    """`tiny_adapted` with a base in this dtype, of weights that float16 holds, the head's times `head`."""
    model = tiny_olmoe(intermediate_size=40)  # rows of 16 bytes and more
    model.lm_head.weight.data *= head
    return AdaptedModel(model.half().to(dtype), 8, ALPHA, ATTENTION)


def deltas(update: ClientUpdate) -> Tensor:
    """All of them as one vector."""
    return torch.cat([delta.flatten() for delta in update.delta.tensors().values()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_in_half_precision_gives_a_valid_update(dtype: torch.dtype) -> None:
    adapted = adapted_in(dtype)
    plan = plan_for(adapted)
    update = fine_tune(adapted, rows(9), plan, PAD)
    validate_update(update, plan, LONGEST)
    assert all(delta.any() for delta in update.delta.tensors().values())


# float16


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


# Cost


def grouped_mm_flops(a: tuple[int, int], b: tuple[int, ...], *_: object, **__: object) -> int:
    """Of [S,in] times [E,in,out], and of [a,S] times [S,b]: torch's counter has no formula for it."""
    return 2 * a[0] * a[1] * b[-1]


@pytest.mark.parametrize("target_modules", [ATTENTION, ("k_proj",)])
@pytest.mark.parametrize("k", [1, 2, TOP_K])
def test_a_step_costs_what_the_planner_says(k: int, target_modules: tuple[str, ...], tmp_path: Path) -> None:
    adapted = tiny_adapted(target_modules=target_modules)
    adapted.model.config.save_pretrained(tmp_path)
    adapted.model.set_attn_implementation("eager")  # the counter counts the CPU's fused attention as 0
    length, labelled, count = 10, 5, 3
    examples = [EncodedRow(list(range(3, 3 + length)), length - labelled, False)] * count
    plan = plan_for(adapted, active_experts=k, batch_size=count, max_steps=1)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops}
    ) as counter:
        update = fine_tune(adapted, examples, plan, PAD)
    shape = read_model_shape(tmp_path)
    planned = training_flops_per_token(shape, k, RANK, target_modules, length, labelled / length)
    assert update.tokens == length * count
    # B1 is multiplied with gate and up side by side, in three products: half of each is zeros.
    zeros = 3 * 2 * (2 * WIDTH) * RANK * k * LAYERS * update.tokens
    assert 0 <= counter.get_total_flops() - planned.total * update.tokens <= zeros


# Rescaler modes


def exact_first_loss(adapted: AdaptedModel, examples: list[EncodedRow], plan: RoundPlan, s: Tensor) -> float:
    adapted.load(plan.adapter, s)
    with torch.no_grad():
        oracle = merged(adapted, with_active_experts(plan.active_experts))
        return exact_token_losses(oracle, collate(examples, PAD)).mean().item()


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


def mass_by_hand(k: int, batches: list[Batch]) -> Tensor:
    """Per layer, the sum over real tokens of the k largest softmax values, in the stock model with k."""
    masses = torch.zeros(LAYERS, dtype=torch.float64)
    for batch in batches:
        real = batch.attention_mask.flatten().bool()
        for layer, logits in enumerate(router_logits(with_active_experts(k), batch)):
            probabilities = logits[real].double().softmax(-1)
            masses[layer] += probabilities.sort(descending=True).values[:, :k].sum()
    return masses


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


# Rows that share a sequence


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


# The same bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"rescaler": "learned"},
        {"rescaler": "fixed"},
        {"rescaler": "mass"},
        {"packed_length": 40},
        {"padding_free": True},
    ],
    ids=str,
)
def test_two_runs_give_the_same_bytes_whatever_the_global_generators_hold(changes: dict[str, Any]) -> None:
    first = train(tiny_adapted(), rows(9), **changes)
    torch.manual_seed(77)
    random.seed(77)
    assert train(tiny_adapted(), rows(9), **changes) == first


def test_training_leaves_the_global_generators_alone() -> None:
    adapted = tiny_adapted()
    before = torch.get_rng_state(), random.getstate()
    train(adapted, rows(9), rescaler="mass")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("part", ["seed", "round", "client"])
def test_batches_follow_seed_round_and_client(part: str) -> None:
    adapted = tiny_adapted()
    one, other = (
        fine_tune(adapted, rows(9), plan_for(adapted, max_steps=1, **{part: value}), PAD) for value in (1, 2)
    )
    assert one.loss != other.loss


@pytest.mark.parametrize(
    "other",
    [
        {"active_experts": 1, "rescaler": "learned", "max_steps": 5},
        {"active_experts": TOP_K, "rescaler": "mass"},
        {"active_experts": 3, "rescaler": "fixed", "rescaler_values": torch.tensor([3.0, -1.0])},
        {"rescaler": "fixed", "trainable": "B", "merged": random_adapter(tiny_adapted(r=3))},
    ],
    ids=lambda other: other["rescaler"],
)
@pytest.mark.parametrize("rescaler", ["learned", "fixed", "mass"])
def test_a_client_after_another_gives_the_bytes_it_gives_alone(rescaler: str, other: dict[str, Any]) -> None:
    alone = train(tiny_adapted(), rows(9), rescaler=rescaler)
    shared = tiny_adapted()
    train(shared, rows(7, seed=1), client=4, adapter=random_adapter(shared), **other)
    assert train(shared, rows(9), rescaler=rescaler) == alone


def test_the_plans_tensors_are_not_changed() -> None:
    adapted = tiny_adapted()
    plan = plan_for(adapted)
    before = {name: value.clone() for name, value in plan.adapter.tensors().items()}
    fine_tune(adapted, rows(9), plan, PAD)
    assert all(torch.equal(before[name], value) for name, value in plan.adapter.tensors().items())
    assert plan.rescaler_values.tolist() == torch.tensor([0.9, 1.2]).tolist()


# A client that breaks: its round goes on without it


def broken(*_: object) -> None:
    raise MemoryError("broken")


def break_forward(adapted: AdaptedModel) -> Any:
    return adapted.layers[1].router.register_forward_pre_hook(broken)


def break_backward(adapted: AdaptedModel) -> Any:
    return adapted.loras[0].A1.register_hook(broken)


@pytest.mark.parametrize("break_in", [break_forward, break_backward])
def test_a_client_after_one_that_broke_gives_the_bytes_it_gives_alone(
    break_in: Callable[[AdaptedModel], Any],
) -> None:
    alone = train(tiny_adapted(), rows(9))
    shared = tiny_adapted()
    hook = break_in(shared)
    with pytest.raises(MemoryError):
        train(shared, rows(7, seed=1), client=4)
    hook.remove()
    assert train(shared, rows(9)) == alone


@pytest.mark.parametrize("break_in", [break_forward, break_backward])
def test_the_model_can_be_evaluated_after_a_client_broke(break_in: Callable[[AdaptedModel], Any]) -> None:
    adapted = tiny_adapted()
    hook = break_in(adapted)
    with pytest.raises(MemoryError):
        train(adapted, rows(7, seed=1))
    hook.remove()
    batch = random_batch()
    adapted.load(adapted.initial_adapter(0), torch.ones(LAYERS))
    with torch.no_grad():
        torch.testing.assert_close(token_losses(adapted, batch).mean(), tiny_olmoe()(**vars(batch)).loss)


# Ranks of a rank method


def test_a_client_of_fewer_ranks_learns_what_zeros_in_the_others_would_leave_it_to_learn() -> None:
    """Ranks of zeros have no gradient: the two routes differ in memory and bytes, not in values."""
    adapted, examples = tiny_adapted(), rows(9)
    cut = random_adapter(adapted).with_rank(2)
    plan = plan_for(adapted, adapter=cut, weight_decay=0.0, learning_rate=1e-3)
    update = fine_tune(adapted, examples, plan, PAD)
    validate_update(update, plan, LONGEST)
    padded = fine_tune(adapted, examples, replace(plan, adapter=cut.with_rank(RANK)), PAD)
    assert update.delta.rank == 2
    assert update.loss == pytest.approx(padded.loss, rel=1e-6)
    for name, delta in update.delta.with_rank(RANK).tensors().items():
        others = padded.delta.tensors()[name]
        assert torch.equal(delta == 0, others == 0), name
        assert (delta - others).abs().max() < 1e-4 < delta.abs().max(), name
    values, more = (sum(map(torch.numel, sent.delta.tensors().values())) for sent in (update, padded))
    assert values * RANK == more * 2
    assert len(encode_update(update, plan)) < len(encode_update(padded, plan))


# FedProx


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
