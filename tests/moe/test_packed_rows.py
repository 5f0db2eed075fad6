"""Rows that share a sequence: no row changes another, and all is as for the same rows each on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.families import FAMILIES, VOCABULARY, tiny
from tests.random_rows import random_rows
from tests.tiny_models import ALPHA, ATTENTION, random_adapter, tiny_olmoe
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from fedflame.cost import refused_families
from fedflame.cost.refused_families import NOT_PACKABLE
from fedflame.data.batches import Batch, PlacedBatch, collate, collate_packed
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.causal_attention import packed
from fedflame.training.token_loss import token_losses

LENGTHS = (13, 9, 17, 5, 21)
WINDOW: dict[str, Any] = {"sliding_window": 6}
SLIDING: dict[str, Any] = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CHOSEN_KEYS: dict[str, Any] = {"index_topk": 4, "index_n_heads": 16}
"""Fewer keys than the rows have. With few heads many keys have the score 0, and which of them are chosen is
chance."""
SPARSE: dict[str, Any] = {
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
PACKABLE = [family for family in FAMILIES if family not in NOT_PACKABLE]
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in PACKABLE),
    ("mixtral", WINDOW),
    *((family, SLIDING) for family in ("gemma4_text", "gpt_oss", "laguna", "afmoe", "mimo_v2_flash", "beam")),
    ("dots3_note_text", {**WINDOW, "layer_types": ["sliding_attention", "indexed_attention"]}),
    *((name, CHOSEN_KEYS) for name in ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4")),
]
"""Every family, and those with windows or with chosen keys also with fewer of them than the rows have."""
every_model = pytest.mark.parametrize(
    ("family", "sizes"), MODELS, ids=[f"{family}-{index}" for index, (family, _) in enumerate(MODELS)]
)


def sequences_of(rows: Sequence[EncodedRow]) -> Batch:
    """Three rows in one sequence, and two in another that is padded."""
    return collate_packed([rows[:3], rows[3:]], 0)


def losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return token_losses(AdaptedModel(model, 2, ALPHA, []), batch)


def leaked(model: PreTrainedModel) -> float:
    """How far the losses of other rows move when the last token of the first row is another one."""
    rows = random_rows(LENGTHS, VOCABULARY)
    ids = rows[0].ids
    others = [EncodedRow([*ids[:-1], 3 + ids[-1] % 80], 2, False), *rows[1:]]
    adapted, answers = AdaptedModel(model, 2, ALPHA, []), LENGTHS[0] - 2
    with torch.no_grad():
        one, other = (token_losses(adapted, sequences_of(some)) for some in (rows, others))
    assert (one[:answers] - other[:answers]).abs().max() > 1e-4
    return float((one[answers:] - other[answers:]).abs().max())


@pytest.mark.slow
@every_model
def test_no_row_changes_the_loss_of_another(family: str, sizes: dict[str, Any]) -> None:
    assert leaked(tiny(family, **sizes)) == 0.0


@pytest.mark.slow
@every_model
def test_every_row_has_the_loss_that_it_has_alone(family: str, sizes: dict[str, Any]) -> None:
    model, rows = tiny(family, **sizes), random_rows(LENGTHS, VOCABULARY)
    alone = torch.cat([losses(model, collate([row], 0)) for row in rows])
    torch.testing.assert_close(losses(model, sequences_of(rows)), alone, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("family", NOT_PACKABLE)
def test_a_family_is_refused_because_a_row_changes_another(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SPARSE if family == "minimax_m3_vl_text" else {}
    with pytest.raises(UserError) as refused:
        leaked(tiny(family, **sizes))
    assert str(refused.value) == (
        f"{family} cannot be trained with training.packing or training.padding_free: {NOT_PACKABLE[family]}; "
        "leave both false"
    )
    monkeypatch.setattr(refused_families, "NOT_PACKABLE", {})
    assert leaked(tiny(family, **sizes)) > 1e-6


def after_a_step(
    model: PreTrainedModel, batch: PlacedBatch, targets: Sequence[str], k: int
) -> dict[str, Tensor]:
    """Mean loss, counts and gradients of one step; those of adapter and rescalers are one vector."""
    adapted = AdaptedModel(model, 2, ALPHA, targets)
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    adapted.counts.begin_step(batch.real_tokens, batch.counted)
    with adapted.training(k):
        loss = batch.mean(token_losses(adapted, batch))
        loss.backward()
    adapted.counts.end_step()
    trained = [*adapted.attached().tensors().values(), *(lora.s for lora in adapted.loras)]
    gradients = [parameter.grad.flatten() for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained) and all(gradient.any() for gradient in gradients)
    return {"loss": loss.detach(), "gradients": torch.cat(gradients), "counts": adapted.counts.total}


STEPPED: list[tuple[str, dict[str, Any], Sequence[str]]] = [
    ("olmoe", {}, ATTENTION),
    ("mixtral", WINDOW, ATTENTION),
    ("gpt_oss", SLIDING, ATTENTION),  # attention sinks, and eager
    ("laguna", SLIDING, ["q_proj", "o_proj"]),
    ("deepseek_v3", {}, ["kv_b_proj", "o_proj"]),  # MLA
    ("glm_moe_dsa", CHOSEN_KEYS, ["o_proj"]),
    ("qwen3_moe", {}, ATTENTION),
]


@pytest.mark.parametrize(("family", "sizes", "targets"), STEPPED, ids=[family for family, *_ in STEPPED])
@pytest.mark.parametrize("layout", ["packed", "padding_free", "few_sizes"])
def test_loss_gradients_and_counts_are_those_of_padded_rows(
    family: str, sizes: dict[str, Any], targets: Sequence[str], layout: str
) -> None:
    rows, cpu = random_rows(LENGTHS, VOCABULARY), torch.device("cpu")
    placed = {
        "packed": sequences_of(rows).on(cpu),
        "padding_free": collate_packed([rows], 0).on(cpu),
        "few_sizes": sequences_of(rows).in_few_sizes(cpu),
    }[layout]
    found = after_a_step(tiny(family, **sizes), placed, targets, 2)
    wanted = after_a_step(tiny(family, **sizes), collate(rows, 0).on(cpu), targets, 2)
    assert torch.equal(found["counts"], wanted["counts"]) and int(found["counts"].sum()) == 4 * sum(LENGTHS)
    for name in ("loss", "gradients"):
        error = (found[name] - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error <= 1e-6, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_of_packed_rows_by_hand(window: int | None) -> None:
    """Two rows of 4 and 2 tokens, and padding, which sees itself."""
    model = tiny("mixtral", sliding_window=window)
    positions, embeddings = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0]]), torch.zeros(1, 8, 4)
    padding = torch.tensor([[1] * 6 + [0, 0]])
    make = create_sliding_window_causal_mask if window else create_causal_mask
    with packed(model, positions):
        mask = make(model.config, embeddings, padding, cache=None, position_ids=positions)
    expected = """
        1000 0000
        1100 0000
        1110 0000
        {far}
        0000 1000
        0000 1100
        0000 0010
        0000 0001
    """.format(far="0111 0000" if window else "1111 0000")
    assert mask is not None and mask.dtype == torch.float32
    seen = [[int(entry) for entry in row.replace(" ", "")] for row in expected.split("\n") if row.strip()]
    assert (mask[0, 0] == 0).long().tolist() == seen
    assert bool((mask[0, 0][torch.tensor(seen) == 0] == torch.finfo(torch.float32).min).all())


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_all_layers_keep_one_mask_for_the_backward(kind: str) -> None:
    """Of truths, torch would make one in numbers for each layer."""
    model = tiny_olmoe()
    model.set_attn_implementation(kind)
    rows, width = random_rows(LENGTHS, VOCABULARY), sum(LENGTHS)
    adapted, kept = AdaptedModel(model, 2, ALPHA, ATTENTION), set()

    def keep(value: Tensor) -> Tensor:
        if value.shape[-2:] == (width, width) and value.shape[1] == 1:
            kept.add(value.untyped_storage().data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = token_losses(adapted, collate_packed([rows], 0)).mean()
    assert len(kept) == (kind == "sdpa")  # eager scores are added to the mask, which then is not needed
    loss.backward()
