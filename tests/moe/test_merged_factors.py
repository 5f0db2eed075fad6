"""Factors that are merged into the base: as further ranks, and the base has its bits again without them."""

from __future__ import annotations

import pytest
import torch
from tests.tiny_models import (
    ALPHA,
    ATTENTION,
    EXPERTS,
    HIDDEN,
    LAYERS,
    RANK,
    SCALING,
    random_adapter,
    random_batch,
    tiny_adapted,
    tiny_olmoe,
)
from torch import Tensor

from fedflame.errors import UserError
from fedflame.messages import NOTHING, Adapter
from fedflame.moe import merged_base
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import MoELayer
from fedflame.training.token_loss import token_losses


def factors(rank: int, seed: int = 3) -> Adapter:
    return random_adapter(tiny_adapted(r=rank), seed)


def base_bits(adapted: AdaptedModel) -> dict[str, Tensor]:
    mine = {id(value) for lora in adapted.loras for value in lora.parameters()}
    mine |= {id(value) for value in adapted.attention.values()}
    weights = {name: value for name, value in adapted.model.named_parameters() if id(value) not in mine}
    return {name: value.detach().clone() for name, value in weights.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("rank", [3, 30])
def test_merged_factors_count_as_further_ranks_of_the_adapter(rank: int) -> None:
    adapted, batch, s = tiny_adapted(), random_batch(), torch.tensor([0.7, 1.3])
    adapter, merged_factors = random_adapter(adapted), factors(rank)
    adapted.load(adapter, s, merged_factors)
    wide = AdaptedModel(tiny_olmoe(), RANK + rank, SCALING * (RANK + rank), ATTENTION)
    wide.load(adapter.concatenate(merged_factors), s)
    with torch.no_grad():
        losses = token_losses(adapted, batch)
        torch.testing.assert_close(losses, token_losses(wide, batch), rtol=1e-4, atol=1e-5)
        adapted.load(adapter, s)
        assert (losses - token_losses(adapted, batch)).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_has_its_bits_again_and_factors_never_add_up(dtype: torch.dtype) -> None:
    def fresh() -> AdaptedModel:
        return AdaptedModel(tiny_olmoe(intermediate_size=40).to(dtype), 8, ALPHA, ATTENTION)

    def wide(rank: int) -> Adapter:
        return random_adapter(AdaptedModel(tiny_olmoe(intermediate_size=40), rank, ALPHA, ATTENTION), rank)

    adapted, other = fresh(), fresh()
    adapter, ones = random_adapter(adapted), torch.ones(LAYERS)
    pristine = base_bits(adapted)
    adapted.load(adapter, ones, wide(5))
    projections = ("gate_up_proj", "down_proj", *(f"{name}.base_layer.weight" for name in ATTENTION))
    assert differing(base_bits(adapted), pristine) == {n for n in pristine if n.endswith(projections)}
    adapted.load(adapter, ones, wide(3))
    other.load(adapter, ones, wide(3))
    assert differing(base_bits(adapted), base_bits(other)) == set()
    for empty in (NOTHING, Adapter({}, {})):
        adapted.load(adapter, ones, wide(3))
        adapted.load(adapter, ones, empty)
        assert differing(base_bits(adapted), pristine) == set()


def test_the_same_factors_are_merged_once_and_none_are_never(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = []
    monkeypatch.setattr(
        merged_base, "merge_into", lambda model, layers, adapter, *_: ranks.append(adapter.rank)
    )
    adapted = tiny_adapted()
    adapter, ones = random_adapter(adapted), torch.ones(LAYERS)
    for merged_factors in (NOTHING, factors(3), factors(3), factors(2), NOTHING, NOTHING, factors(2)):
        adapted.load(adapter, ones, merged_factors)
    assert ranks == [3, 2, 2]


def test_a_merge_that_broke_on_the_way_is_undone_by_the_next_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object, layers: list[MoELayer], *_: object) -> None:
        layers[0].experts.get_parameter("down_proj").fill_(1.0)
        raise MemoryError

    adapted = tiny_adapted()
    adapter, ones, pristine = random_adapter(adapted), torch.ones(LAYERS), base_bits(adapted)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(merged_base, "merge_into", broken)
        adapted.load(adapter, ones, factors(3))
    assert differing(base_bits(adapted), pristine) == {"model.layers.0.mlp.experts.down_proj"}
    adapted.load(adapter, ones)
    assert differing(base_bits(adapted), pristine) == set()


@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        (
            "experts.1.A1",
            torch.ones(EXPERTS, HIDDEN, 2 * RANK),
            r"is \(6, 24, 8\); the model needs \(6, 8, 24\)",
        ),
        ("attention.model.layers.0.self_attn.k_proj.B", None, r"is missing; the model needs \(12, 4\)"),
        ("experts.2.A1", torch.ones(3), r"is \(3,\); the model needs none"),
    ],
)
def test_values_that_do_not_fit_are_refused_and_change_nothing(
    kind: str, name: str, value: Tensor | None, reason: str
) -> None:
    adapted = tiny_adapted()
    right, before = random_adapter(adapted), adapted.adapter().tensors()
    values = {other: kept for other, kept in right.tensors().items() if other != name}
    wrong = Adapter.from_tensors(values | ({} if value is None else {name: value}))
    pair = (wrong, right) if kind == "adapter" else (right, wrong)
    with pytest.raises(UserError, match=f"{kind} value {name} {reason}"):
        adapted.load(pair[0], torch.ones(LAYERS), pair[1])
    assert differing(before, adapted.adapter().tensors()) == set()
