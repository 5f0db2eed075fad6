"""What a round moves: the half, the ranks and the experts that it trains, and nothing else of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.tiny_models import LAYERS, PAD, RANK, TOP_K, forbid_expert, random_adapter, tiny_adapted
from tests.training.one_client import LONGEST, plan_for, rows, train

from fedflame.messages import half_of
from fedflame.server.validation import validate_update
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.codec import encode_update


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


def test_the_plans_tensors_are_not_changed() -> None:
    adapted = tiny_adapted()
    plan = plan_for(adapted)
    before = {name: value.clone() for name, value in plan.adapter.tensors().items()}
    fine_tune(adapted, rows(9), plan, PAD)
    assert all(torch.equal(before[name], value) for name, value in plan.adapter.tensors().items())
    assert plan.rescaler_values.tolist() == torch.tensor([0.9, 1.2]).tolist()


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
