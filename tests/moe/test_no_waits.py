"""A training step on the meta device, where whatever would wait for a GPU raises.

Reading a value (`item`, `cpu`, `nonzero`, a mask as an index, `bincount`) is impossible there. A fake meta
device finds operands on different devices, too.
"""

from __future__ import annotations

import pytest
import torch
from tests import families
from tests.families import FAMILIES, tiny
from tests.tiny_models import ALPHA, ATTENTION, LAYERS, RANK, random_batch, tiny_olmoe
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from fedflame.config.words import Checkpointed
from fedflame.cost.refused_families import NOT_PACKABLE
from fedflame.data.batches import Batch, collate_packed
from fedflame.data.encoding import EncodedRow
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.training.steps import training_steps
from fedflame.training.token_loss import token_losses

READ_THE_MASK = NOT_PACKABLE.keys() - {"minimax_m3_vl_text"}
"""Families with recurrent layers: transformers asks for these whether the padding mask is all ones, once a
step."""


def train_step(adapted: AdaptedModel, batch: Batch, k: int, coef: float = 0.0, p: float = 0.0) -> None:
    scalars = [lora.s for lora in adapted.loras]
    optimizer = ExpertAdamW(adapted.loras, adapted.attention.values(), 0.01, 0.1, scalars)
    with adapted.training(k, p):
        loss = training_steps(adapted, optimizer, router_aux_loss_coef=coef)(batch)
    assert loss.device.type == adapted.counts.total.device.type == "meta"


@pytest.mark.parametrize("checkpointing", ["none", "experts", "layers"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_waits_for_nothing(k: int, checkpointing: Checkpointed) -> None:
    model = tiny_olmoe(intermediate_size=40).bfloat16().to("meta")
    adapted = AdaptedModel(model, RANK, ALPHA, ATTENTION, checkpointing)
    train_step(adapted, random_batch(), k)
    assert len(adapted.attention) == 2 * len(ATTENTION) * LAYERS
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("checkpointing", ["none", "experts", "layers"])
def test_a_step_with_dropout_and_balanced_routers_waits_for_nothing(checkpointing: Checkpointed) -> None:
    model = tiny_olmoe(intermediate_size=40).bfloat16().to("meta")
    adapted = AdaptedModel(model, RANK, ALPHA, ATTENTION, checkpointing)
    train_step(adapted, random_batch(), 2, coef=0.5, p=0.1)


@pytest.fixture
def _aligned_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes whose rows are multiples of 16 bytes in bfloat16, the only dtype of grouped_mm on meta."""
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        monkeypatch.setitem(families.SIZES, name, 40)


@pytest.mark.usefixtures("_aligned_widths")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_waits_for_nothing_of_ours(family: str) -> None:
    adapted = AdaptedModel(tiny(family).bfloat16().to("meta"), 2, ALPHA, [])
    if family not in READ_THE_MASK:
        train_step(adapted, random_batch(), 2)
        return
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        train_step(adapted, random_batch(), 2)


@pytest.mark.usefixtures("_aligned_widths")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_PACKABLE])
def test_a_step_on_packed_rows_waits_for_nothing(family: str) -> None:
    adapted = AdaptedModel(tiny(family).bfloat16().to("meta"), 2, ALPHA, [])
    rows = [EncodedRow(list(range(3, 3 + length)), 2, False) for length in (11, 7, 4)]
    train_step(adapted, collate_packed([rows[:2], rows[2:]], 0), 2)


class ReadBatch(Batch):
    """A batch whose values have been read: a fake tensor has none."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.input_ids, batch.attention_mask, batch.labels)
        self.__dict__["read"] = (batch.predictors, batch.targets, batch.real_tokens)

    predictors = property(lambda self: self.read[0])  # type: ignore[assignment]
    targets = property(lambda self: self.read[1])  # type: ignore[assignment]
    real_tokens = property(lambda self: self.read[2])  # type: ignore[assignment]


def fake_step(head: str) -> None:
    """A step in which every tensor is fake, with the output embedding on this device."""
    batch, config = ReadBatch(random_batch()), tiny_olmoe(intermediate_size=40).config
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        adapted = AdaptedModel(model, RANK, ALPHA, ())  # PEFT cannot attach to fake weights
        weight = torch.ones(model.lm_head.weight.shape, device=head, dtype=torch.bfloat16)
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with mode, adapted.training(2):
        placed = batch.on(adapted.device)
        adapted.counts.begin_step(placed.real_tokens)
        token_losses(adapted, placed).mean().backward()
        adapted.counts.end_step()


@pytest.mark.slow
def test_a_step_mixes_no_devices() -> None:
    fake_step("meta")
    with pytest.raises(RuntimeError, match="device"):
        fake_step("cpu")
