"""Rows that are clipped by their norms against rows that are clipped one at a time."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from tests.tiny_models import LAYERS, PAD, VOCABULARY, random_adapter, tiny_adapted
from tests.training.one_client import rows
from torch import Tensor

from fedflame.config.words import Clipping, Trainable
from fedflame.data.batches import collate
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.row_norms import RowNorms, row_norms
from fedflame.training import clipped_sums as module
from fedflame.training.clipped_sums import clipped_sums, require_clippable, trained_values
from fedflame.training.token_loss import row_losses

CLIP = 0.5


def ready(trainable: Trainable = "both", learned: bool = True) -> AdaptedModel:
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.tensor([0.9, 1.2]))
    adapted.set_trainable(trainable)
    for lora in adapted.loras:
        lora.s.requires_grad_(learned)
    return adapted


def both(adapted: AdaptedModel, examples: list[EncodedRow], k: int) -> list[dict[str, Tensor]]:
    found = []
    for clipping in ("row", "ghost"):
        with adapted.training(k):
            found.append(clipped_sums(adapted, [[row] for row in examples], CLIP, clipping, PAD))
    return found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() != set()
    for name, value in one.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5 * max(largest, 1e-3), msg=name)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("trainable", "learned"), [("both", True), ("A", True), ("B", False)])
def test_by_norms_the_sum_is_that_of_one_row_at_a_time(k: int, trainable: Trainable, learned: bool) -> None:
    adapted = ready(trainable, learned)
    one, other = both(adapted, rows(9), k)
    assert_close(one, other)
    assert ("0.s" in one) == learned
    assert all(lora.row_norms is None for lora in adapted.loras)
    assert adapted.counts.real_tokens is None


def test_norms_are_those_of_each_row_alone() -> None:
    adapted, examples = ready(), rows(7)
    batch = collate(examples, PAD)
    wanted = []
    with adapted.training(2):
        for row in examples:
            gradient = module._gradient(adapted, trained_values(adapted), [row], PAD)
            wanted.append(math.sqrt(sum(float(value.double().square().sum()) for value in gradient.values())))
        adapted.counts.begin_step(batch.real_tokens)
        with row_norms(adapted, batch.attention_mask) as norms:
            row_losses(adapted, batch).sum().backward()
        adapted.counts.abandon_step()
    assert norms.squares.sqrt().tolist() == pytest.approx(wanted, rel=1e-5)
    assert max(wanted) > CLIP > min(wanted) or max(wanted) > 1.5 * min(wanted)


def test_a_client_of_a_smaller_rank_comes_next_and_nothing_of_the_first_is_kept() -> None:
    """What is kept of a batch goes without the garbage collector: it is as much as a step takes."""
    adapted, examples = ready(), rows(5)
    both(adapted, examples, 2)
    adapted.load(random_adapter(adapted).with_rank(1), torch.ones(LAYERS))
    batch = collate(examples, PAD)
    with adapted.training(2):
        adapted.counts.begin_step(batch.real_tokens)
        with row_norms(adapted, batch.attention_mask) as norms:
            row_losses(adapted, batch).sum().backward()
        adapted.counts.abandon_step()
    known = weakref.ref(norms)
    del norms
    assert known() is None
    assert_close(*both(adapted, examples, 2))


def test_a_module_that_rows_pass_twice_is_refused() -> None:
    """Its gradient is the sum of two, whose squares do not add up to that of the sum."""
    weight, d_out, x = torch.rand(3, 5), torch.rand(2, 4, 3), torch.rand(2, 4, 5)
    norms = RowNorms(torch.tensor([0, 1]), 2)
    norms.linear(weight, d_out, x)
    factors = torch.tensor([1.0, 0.5], dtype=torch.float64)
    by_hand = d_out[0].T @ x[0] + 0.5 * d_out[1].T @ x[1]
    torch.testing.assert_close(norms.sums(factors)[weight], by_hand)
    norms.linear(weight, d_out, x)
    with pytest.raises(UserError, match="pass a module of this model twice"):
        norms.sums(factors)


def test_rows_are_taken_in_batches_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GHOST_TOKENS", 20)
    parts = list(module._alike(rows(9)))
    assert len(parts) > 3 and sorted(len(row.ids) for row in rows(9)) == [
        len(row.ids) for part in parts for row in part
    ]
    assert all(len(part) == 1 or len(part) * len(part[-1].ids) <= 20 for part in parts)
    assert_close(*both(ready(), rows(9), 2))


def test_a_row_that_is_not_finite_leaves_the_others_as_they_are() -> None:
    adapted, examples = ready(), rows(6)
    bad = min({*range(3, VOCABULARY)} - {token for row in examples for token in row.ids})
    with torch.no_grad():
        adapted.model.get_input_embeddings().weight[bad] = math.nan
    spoiled = EncodedRow([examples[0].ids[0], bad, *examples[0].ids[1:3]], 1, False)
    for found in both(adapted, [*examples[:3], spoiled, *examples[3:]], 2):
        assert_close(found, both(adapted, examples, 2)[0])
    for found in both(adapted, [spoiled], 2):
        assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("clipping", ["row", "ghost"])
def test_units_without_rows_add_nothing(clipping: Clipping) -> None:
    adapted = ready()
    (row,) = rows(1)
    with adapted.training(2):
        found = [
            clipped_sums(adapted, units, CLIP, clipping, PAD) for units in ([[row]], [[], [row], []], [])
        ]
    assert_close(found[0], found[1])
    assert not any(value.any() for value in found[2].values()) and len(found[2]) == len(found[0])


def test_an_empty_answer_adds_nothing_and_spoils_nothing() -> None:
    adapted, examples = ready(), rows(4)
    empty = EncodedRow([5, 6, 7, 8], 4, False)
    for found in both(adapted, [*examples, empty], 2):
        assert_close(found, both(adapted, examples, 2)[0])


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "clipping", "line"),
    [
        ("float16", "none", "row", "float16 would skip steps"),
        ("bfloat16", "none", "ghost", "base in bfloat16: its sums are rounded"),
        ("float32", "layers", "ghost", "keeps what layers would compute again"),
    ],
)
def test_what_cannot_be_clipped_so_is_refused(
    dtype: str, checkpointing: str, clipping: Clipping, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = ready()
    require_clippable(adapted, clipping)
    monkeypatch.setattr(AdaptedModel, "dtype", dtype)
    monkeypatch.setattr(adapted, "gradient_checkpointing", checkpointing)
    with pytest.raises(UserError, match=line):
        require_clippable(adapted, clipping)
    assert len(adapted.loras) == LAYERS
