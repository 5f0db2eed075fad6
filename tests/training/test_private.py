"""Private rounds: their steps by hand, and what of the rows can be seen in what leaves the client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny_models import ATTENTION, EXPERTS, LAYERS, PAD, random_adapter, tiny_adapted
from tests.training.one_client import plan_for, rows
from tests.training.rounds_by_hand import gradients_of_a_merged_model
from torch import Tensor

from fedflame.config.words import Clipping
from fedflame.data.batches import collate
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.privacy.noise import Noise
from fedflame.privacy.terms import MOST_STEPS, terms_of
from fedflame.server.validation import validate_update
from fedflame.training import private
from fedflame.training.clipped_sums import clipped_sums, trained_values
from fedflame.training.private import fine_tune_privately
from fedflame.wire.codec import encode_update

NOISE = Noise(bytes(32), ("run", "plan"))


def private_plan(adapted: AdaptedModel, **changes: Any) -> RoundPlan:
    terms = {"clip_norm": 0.5, "noise_multiplier": 0.8, "target_delta": 1e-5, "private_steps": 30}
    return plan_for(adapted, **terms | changes)


def train(adapted: AdaptedModel, examples: Sequence[EncodedRow], plan: RoundPlan) -> ClientUpdate:
    return fine_tune_privately(adapted, [[row] for row in examples], plan, PAD, NOISE)


def test_a_step_is_adamw_by_hand_on_clipped_gradients_of_a_merged_model_and_noise() -> None:
    adapted, examples = tiny_adapted(), rows(7)
    start, s = random_adapter(adapted), torch.tensor([0.9, 1.2])
    plan = private_plan(adapted, adapter=start, max_steps=1, batch_size=5)
    update = train(adapted, examples, plan)

    chosen = NOISE.sample(7, 5 / 7, 0)
    assert 0 < len(chosen) < 7
    sums: dict[str, Tensor] = {}
    norms = []
    for row in chosen:
        adapted.load(start, s)
        gradient = gradients_of_a_merged_model(adapted, 2, collate([examples[row]], PAD))
        norms.append(math.sqrt(sum(float(value.square().sum()) for value in gradient.values())))
        for name, value in gradient.items():
            sums[name] = sums.get(name, 0) + value * min(1, 0.5 / norms[-1])
    assert max(norms) > 0.5, "something is clipped"
    expected = {}
    for name, total in sums.items():
        own = f"{name.removeprefix('s.')}.s" if name.startswith("s.") else name
        g = (total + 0.8 * 0.5 * NOISE.normal(total.shape, 0, own).double()) / 5
        decay = 0 if name.startswith("s.") else 0.1
        before = s.double()[int(name[2:])] if name.startswith("s.") else start.tensors()[name].double()
        expected[name] = -plan.learning_rate * (decay * before + g / (g.abs() + 1e-8))
    for name, value in update.delta.tensors().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=2e-5)
    for layer in range(LAYERS):
        moved = update.rescaler_values[layer].double() - s.double()[layer]
        torch.testing.assert_close(moved, expected[f"s.{layer}"], rtol=1e-3, atol=2e-5)


def test_with_the_noised_sums_fixed_unrelated_rows_give_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing else of the rows than these sums is in the message: no count, no loss, no length."""
    adapted = tiny_adapted()
    monkeypatch.setattr(
        private,
        "clipped_sums",
        lambda adapted, *__: {n: torch.ones_like(v) for n, v in trained_values(adapted).items()},
    )
    plan = private_plan(adapted, adapter=random_adapter(adapted))
    one, other = rows(9, seed=1), rows(9, seed=2)
    other[0] = replace(other[0], ids=other[0].ids * 3)
    messages = {encode_update(train(adapted, examples, plan), plan) for examples in (one, other)}
    assert len(messages) == 1


@pytest.mark.parametrize("clipping", ["row", "ghost"])
@pytest.mark.parametrize(
    "changed",
    [
        rows(1, seed=99)[0],
        EncodedRow([5, 6, 7, 8], 4, False),  # its answer is empty
        EncodedRow([5] * 60, 1, True),
    ],
    ids=["another row", "an empty answer", "a truncated row"],
)
def test_a_row_moves_the_sum_before_the_noise_by_no_more_than_the_clip_norm(
    changed: EncodedRow, clipping: Clipping
) -> None:
    adapted, examples = tiny_adapted(), rows(6)
    plan = private_plan(adapted)
    adapted.load(random_adapter(adapted), plan.rescaler_values)
    private.client_optimizer(adapted, plan)

    def sums(of: Sequence[EncodedRow]) -> Tensor:
        with adapted.training(2):
            found = clipped_sums(adapted, [[row] for row in of], 0.3, clipping, PAD)
        return torch.cat([value.flatten() for value in found.values()])

    without, with_row = sums(examples), sums([*examples, changed])
    assert float((with_row - without).norm()) <= 0.3 * (1 + 1e-5)


def test_the_rows_of_a_person_are_clipped_together() -> None:
    adapted = tiny_adapted()
    plan = private_plan(adapted, clip_norm=1e9, noise_multiplier=1e-15, max_steps=1, batch_size=3)
    a, b, c = rows(3)
    update = fine_tune_privately(adapted, [[a, b], [c]], plan, PAD, NOISE)
    assert (update.sampling_rate, update.num_examples) == (1.0, 3)
    adapted.load(plan.adapter, plan.rescaler_values)
    gradient = [gradients_of_a_merged_model(adapted, 2, collate([row], PAD)) for row in (a, b, c)]
    private.client_optimizer(adapted, plan)
    with adapted.training(2):
        sums = clipped_sums(adapted, [[a, b], [c]], 0.25, "ghost", PAD)
    person = {name: (gradient[0][name] + gradient[1][name]) / 2 for name in gradient[0]}
    for name, value in sums.items():
        own = f"s.{name[:-2]}" if name.endswith(".s") else name
        wanted = person[own] * factor(person, 0.25) + gradient[2][own] * factor(gradient[2], 0.25)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-6)


def factor(gradient: dict[str, Tensor], clip_norm: float) -> float:
    norm = math.sqrt(sum(float(value.square().sum()) for value in gradient.values()))
    assert norm > clip_norm, "it is clipped"
    return clip_norm / norm


def test_every_value_moves_and_every_expert_travels() -> None:
    adapted = tiny_adapted()
    update = train(adapted, rows(9), private_plan(adapted, active_experts=1, max_steps=1))
    assert all(bool((delta != 0).all()) for delta in update.delta.tensors().values())
    assert bool((update.counts > 0).all())


def test_a_step_whose_sample_is_empty_is_a_step_like_any_other() -> None:
    adapted = tiny_adapted()
    empty = next(step for step in range(30) if not NOISE.sample(9, 1 / 9, step))
    plan = private_plan(adapted, batch_size=1, max_steps=empty + 1)
    before = train(adapted, rows(9), replace(plan, max_steps=empty)) if empty else None
    update = train(adapted, rows(9), plan)
    assert update.steps == empty + 1
    for name, delta in update.delta.tensors().items():
        assert bool((delta != (before.delta.tensors()[name] if before else 0)).all())


def test_a_step_for_more_rows_than_there_are_is_one_of_all_rows() -> None:
    adapted, examples = tiny_adapted(), rows(4)
    of_all, of_more = (
        train(adapted, examples, private_plan(adapted, batch_size=size, proximal_mu=0.3)) for size in (4, 50)
    )
    for name, delta in of_all.delta.tensors().items():
        assert torch.equal(delta, of_more.delta.tensors()[name])


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_told_beside_the_values_follows_from_the_plan_alone(k: int) -> None:
    adapted, examples = tiny_adapted(), rows(9)
    plan = private_plan(adapted, active_experts=k)
    update = train(adapted, examples, plan)
    validate_update(update, plan, 16)
    assert (update.loss, update.steps, update.num_examples) == (None, 3, 9)
    assert update.tokens == 12 and update.trained_examples == 9
    assert update.counts.tolist() == [[12 * k // EXPERTS] * EXPERTS] * LAYERS


def test_counts_that_cannot_be_shared_out_evenly_differ_by_one() -> None:
    adapted = tiny_adapted()
    plan = private_plan(adapted, batch_size=7, max_steps=1)
    update = train(adapted, rows(9), plan)
    validate_update(update, plan, 16)
    assert update.counts.tolist() == [[3, 3, 2, 2, 2, 2]] * LAYERS


def test_a_round_of_fewer_rows_than_experts_counts_every_expert() -> None:
    adapted = tiny_adapted()
    plan = private_plan(adapted, batch_size=1, max_steps=1, active_experts=1)
    update = train(adapted, rows(9), plan)
    validate_update(update, plan, 16)
    assert update.counts.tolist() == [[1] * EXPERTS] * LAYERS


def test_a_frozen_half_and_a_fixed_rescaler_stay() -> None:
    adapted = tiny_adapted()
    plan = private_plan(adapted, trainable="B", rescaler="fixed")
    update = train(adapted, rows(9), plan)
    assert torch.equal(update.rescaler_values, plan.rescaler_values)
    for name, delta in update.delta.tensors().items():
        moves = name.rpartition(".")[2].startswith("B")
        assert bool((delta != 0).all()) if moves else not bool(delta.any())


def test_a_run_of_more_steps_than_can_be_accounted_for_is_one_line() -> None:
    plan = private_plan(tiny_adapted(), private_steps=MOST_STEPS)
    assert terms_of(plan, 20).noise_multiplier == 0.8
    with pytest.raises(UserError, match=r"a private run of 1,000,001 steps; it may have 1,000,000 at most\."):
        terms_of(replace(plan, private_steps=MOST_STEPS + 1), 20)


@pytest.mark.slow
def test_terms_of_a_method_enter_after_the_noise() -> None:
    """FedProx pulls back what noise has moved, however small the clip norm is."""
    adapted = tiny_adapted()
    plan = private_plan(adapted, clip_norm=1e-6, max_steps=8, weight_decay=0.0, learning_rate=0.001)
    free, held = (train(adapted, rows(9), replace(plan, proximal_mu=mu)) for mu in (0.0, 100.0))
    size = [sum(float(v.square().sum()) for v in u.delta.tensors().values()) for u in (free, held)]
    assert size[1] < size[0] / 2


def test_the_order_of_the_rows_of_a_step_and_the_target_modules_are_free() -> None:
    adapted = tiny_adapted(target_modules=())
    update = train(adapted, rows(9), private_plan(adapted))
    assert not update.delta.attention and len(ATTENTION) == 4


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tokens_per_step": 64}, "tokens_per_step = 64"),
        ({"packed_length": 64}, "packed_length = 64"),
        ({"padding_free": True}, "padding_free = True"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2"),
        ({"num_train_epochs": 1.0}, "num_train_epochs = 1.0"),
        ({"lora_dropout": 0.1}, "lora_dropout = 0.1"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef = 0.1"),
        ({"rescaler": "mass"}, "rescaler = 'mass'"),
        ({"noise_multiplier": 0.0}, "without noise_multiplier and target_epsilon"),
        ({"target_delta": 0.2}, "privacy.delta = 0.2 with 9 rows: it must be below 0.11"),
        ({"target_delta": 0.0}, "privacy.delta = 0"),
    ],
)
def test_a_plan_that_would_tell_of_rows_is_refused(changes: dict[str, Any], line: str) -> None:
    adapted = tiny_adapted()
    with pytest.raises(UserError, match=line):
        train(adapted, rows(9), private_plan(adapted, **changes))


@pytest.mark.slow
def test_noise_follows_from_epsilon_where_no_multiplier_is_given() -> None:
    adapted = tiny_adapted()
    plan = private_plan(adapted, noise_multiplier=0.0, target_epsilon=4.0)
    few, many = terms_of(plan, 20), terms_of(plan, 200)
    assert few.sampling_rate == 0.2 and many.sampling_rate == 0.02
    assert few.noise_multiplier > many.noise_multiplier > 0.3
    assert terms_of(plan, 3).sampling_rate == 1.0
