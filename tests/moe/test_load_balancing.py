"""The load-balancing loss: against transformers' own, by hand, and in the objective of a step."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from tests.families import FAMILIES, TOP_K, VOCABULARY, tiny
from tests.tiny_models import (
    ALPHA,
    ATTENTION,
    EXPERTS,
    LAYERS,
    RANK,
    random_adapter,
    random_batch,
    tiny_adapted,
    tiny_olmoe,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedflame.config.words import Checkpointed
from fedflame.cost.refused_families import BALANCED, NOT_PACKABLE
from fedflame.data.batches import Batch, collate_packed
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.training.steps import training_steps
from fedflame.training.token_loss import token_losses

COEF = 0.7


def test_the_families_are_those_whose_model_has_such_a_loss() -> None:
    found = {
        family
        for family in FAMILIES
        if hasattr(importlib.import_module(type(tiny(family)).__module__), "load_balancing_loss_func")
    }
    assert found == BALANCED


def ids(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and the mask."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    draws = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCABULARY, mask.shape, generator=draws).where(mask, 0), mask.long()


def balance_of(adapted: AdaptedModel, batch: Batch) -> Tensor:
    placed = batch.on(adapted.device)
    adapted.counts.begin_step(placed.real_tokens, placed.counted)
    with (balancing := adapted.load_balancing).recorded():
        token_losses(adapted, placed)
    adapted.counts.end_step()
    return balancing.loss(placed.real_tokens, placed.counted)


def stock_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        output_router_logits=True,
        use_cache=False,
    )
    return output.aux_loss


@pytest.mark.parametrize("lengths", [(9, 9), (9, 5, 3)], ids=["no padding", "padding"])
@pytest.mark.parametrize("family", sorted(BALANCED))
def test_every_family_has_the_loss_of_transformers_at_a_clients_k(
    family: str, lengths: tuple[int, ...]
) -> None:
    input_ids, mask = ids(lengths)
    batch = Batch(input_ids, mask, input_ids.where(mask.bool(), -100))
    adapted = AdaptedModel(tiny(family), 2, 4.0, ())
    for k in (2, TOP_K):
        with torch.no_grad(), adapted.active_experts(k):
            got = balance_of(adapted, batch)
            wanted = stock_loss(tiny(family, k=k), batch)
        assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_family_without_one_is_refused() -> None:
    adapted = AdaptedModel(tiny("deepseek_v3"), 2, 4.0, ())
    with pytest.raises(UserError) as caught:
        balance_of(adapted, random_batch())
    assert str(caught.value) == (
        "deepseek_v3 cannot be trained with training.router_aux_loss_coef: transformers has no "
        "load-balancing loss for its routers; leave it 0"
    )


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_packed_rows_have_the_loss_of_the_same_rows_alone(family: str) -> None:
    assert family not in NOT_PACKABLE
    rows = [EncodedRow(list(range(3, 3 + length)), 2, False) for length in (11, 7, 4)]
    adapted = AdaptedModel(tiny(family), 2, 4.0, ())
    with torch.no_grad(), adapted.training(2):
        alone, packed, end_to_end = (
            balance_of(adapted, collate_packed(sequences, 0))
            for sequences in ([[row] for row in rows], [rows[:2], rows[2:]], [rows])
        )
    assert alone.item() == pytest.approx(packed.item(), rel=1e-5)
    assert alone.item() == pytest.approx(end_to_end.item(), rel=1e-5)


def test_tokens_that_do_not_count_are_left_out_where_all_are_computed() -> None:
    adapted, batch = tiny_adapted(), random_batch()
    few = batch.in_few_sizes(adapted.device)
    assert few.counted is not None
    with torch.no_grad():
        with (balancing := adapted.load_balancing).recorded():
            token_losses(adapted, few)
        assert balancing.loss(None, few.counted).item() == pytest.approx(balance_of(adapted, batch).item())


# In the objective


class Gradients(ExpertAdamW):
    """An optimizer that keeps the gradients of a step and moves nothing."""

    def backward(self, objective: Tensor, touched: Tensor) -> None:
        objective.backward()
        self.objective = objective.item()
        self.found = [value.grad.clone() for value in self.values]


def step(coef: float, batches: list[Batch], checkpointing: Checkpointed, k: int = 2) -> dict[str, Any]:
    adapted = AdaptedModel(tiny_olmoe(), RANK, ALPHA, ATTENTION, checkpointing)
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    scalars: list[nn.Parameter] = [lora.s for lora in adapted.loras]
    optimizer = Gradients(adapted.loras, adapted.attention.values(), 0.01, 0.1, scalars)
    optimizer.values = [*adapted.attached().tensors().values(), *scalars]
    with adapted.training(k):
        loss = training_steps(adapted, optimizer, router_aux_loss_coef=coef)(*batches)
    return {
        "loss": loss.item(),
        "objective": optimizer.objective,
        "gradients": optimizer.found,
        "counts": adapted.counts.total,
    }


def balance_gradients(batches: list[Batch], shares: list[float]) -> tuple[float, list[Tensor]]:
    """The loss by transformers' function on the routers' own outputs, and its gradients by autograd alone."""
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    modeling = importlib.import_module(type(adapted.model).__module__)
    whole = torch.zeros(())
    for batch, share in zip(batches, shares, strict=True):
        with adapted.active_experts(2):
            logits = adapted.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_router_logits=True,
                use_cache=False,
            ).router_logits
        loss = modeling.load_balancing_loss_func(logits, EXPERTS, 2, batch.attention_mask)
        whole = whole + share * loss
    values = [*adapted.attached().tensors().values(), *[lora.s for lora in adapted.loras]]
    found = torch.autograd.grad(whole, values, allow_unused=True)
    return whole.item(), [
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(values, found, strict=True)
    ]


@pytest.mark.parametrize("checkpointing", ["none", "experts", "layers"])
@pytest.mark.parametrize("sizes", [(3,), (1, 2)], ids=["one batch", "two batches"])
def test_the_objective_and_its_gradients_have_the_loss_added_once_for_each_batch(
    sizes: tuple[int, ...], checkpointing: Checkpointed
) -> None:
    whole = random_batch(3)
    parts = zip(*(v.split(sizes) for v in (whole.input_ids, whole.attention_mask, whole.labels)), strict=True)
    batches = [Batch(*part) for part in parts]
    labelled = [len(batch.targets) for batch in batches]
    shares = [count / sum(labelled) for count in labelled]
    plain, added = (step(coef, batches, checkpointing) for coef in (0.0, COEF))
    value, gradients = balance_gradients(batches, shares)
    assert added["loss"] == plain["loss"], "what is reported is the loss of the tokens alone"
    assert torch.equal(added["counts"], plain["counts"])
    if len(batches) == 1:
        assert added["objective"] == pytest.approx(plain["objective"] + COEF * value, rel=1e-6)
    for one, other, gradient in zip(added["gradients"], plain["gradients"], gradients, strict=True):
        torch.testing.assert_close(one, other + COEF * gradient, rtol=1e-4, atol=1e-6)
    assert sum(bool(gradient.any()) for gradient in gradients) > LAYERS * 4
