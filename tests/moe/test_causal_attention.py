"""Attention without a mask over rows that are padded on the right, against transformers' own with its
mask."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.families import FAMILIES, tiny
from tests.tiny_models import random_batch, tiny_olmoe
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from fedflame.data.batches import Batch
from fedflame.moe.causal_attention import packed, right_padded


def states(model: Any, batch: Batch) -> Tensor:
    """The last hidden states of the tokens that are no padding."""
    with torch.no_grad():
        output = model.get_decoder()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    return output.last_hidden_state[batch.attention_mask.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_every_family_are_as_with_a_mask(family: str) -> None:
    """Its rows are longer than the windows of families that have some."""
    model, batch = tiny(family), random_batch(lengths=(40, 23, 5))
    expected = states(model, batch)
    with right_padded(model):
        found = states(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def masks_given(model: nn.Module, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    given: list[Tensor | None] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        given.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    states(model, batch)
    return given


def test_no_mask_is_made_within_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_olmoe(), random_batch()
    with right_padded(model):
        assert masks_given(model, batch, monkeypatch) == [None, None]
    assert all(mask is not None for mask in masks_given(model, batch, monkeypatch))


def test_a_window_that_is_shorter_than_the_rows_keeps_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mixtral", sliding_window=8)
    with right_padded(model):
        assert all(mask is not None for mask in masks_given(model, random_batch(), monkeypatch))
        short = random_batch(lengths=(7, 4))
        assert masks_given(model, short, monkeypatch) == [None, None]


def plain_mask(model: PreTrainedModel) -> Tensor | None:
    """What transformers makes now for a row of three tokens and a row of two."""
    padding = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return create_causal_mask(model.config, torch.zeros(2, 3, 4), padding, cache=None)


def test_a_model_that_attends_otherwise_keeps_what_it_has() -> None:
    model = tiny_olmoe()
    model.set_attn_implementation("eager")
    before = plain_mask(model)
    assert before is not None
    with right_padded(model):
        assert torch.equal(plain_mask(model), before)  # type: ignore[arg-type]


def test_after_an_error_masks_are_made_as_before() -> None:
    model = tiny_olmoe()
    with pytest.raises(KeyError), right_padded(model):
        assert plain_mask(model) is None
        raise KeyError
    assert plain_mask(model) is not None


def test_another_thread_makes_its_own_masks() -> None:
    """Several trainers may live in one process."""
    model, positions = tiny_olmoe(), torch.tensor([[0, 0, 1], [0, 1, 2]])
    with ThreadPoolExecutor(1) as other:
        expected = other.submit(plain_mask, model).result()
        with packed(model, positions):
            mine = plain_mask(model)
            found = other.submit(plain_mask, model).result()
    assert expected is not None and found is not None and mine is not None
    assert torch.equal(found, expected) and mine.dtype != found.dtype


@pytest.mark.parametrize("family", ["axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"])
def test_a_family_that_chooses_keys_chooses_them_within_the_block_too(family: str) -> None:
    """Its rows have more keys than it chooses; with many heads no two keys have the same score."""
    model, batch = tiny(family, index_topk=4, index_n_heads=16), random_batch(lengths=(40, 23, 5))
    expected = states(model, batch)
    with right_padded(model):
        found = states(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
