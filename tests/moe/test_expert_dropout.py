"""`lora_dropout`: the experts against a slow loop with the same masks, and a client's round."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.random_rows import random_rows
from tests.tiny_models import (
    ALPHA,
    ATTENTION,
    HIDDEN,
    PAD,
    RANK,
    TOP_K,
    VOCABULARY,
    WIDTH,
    random_adapter,
    random_batch,
    tiny_adapted,
    tiny_olmoe,
)
from torch import Tensor, nn

from fedflame.bench.measurement import saved_bytes
from fedflame.bench.methods import Pass
from fedflame.config.words import Checkpointed
from fedflame.cost.memory import training_memory
from fedflame.cost.model_shape import read_model_shape
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.moe import fused_experts
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_dropout import draw_masks
from fedflame.moe.expert_lora import BANKS
from fedflame.moe.routed_rows import RoutedRows
from fedflame.training import fine_tune as fine_tune_module
from fedflame.training.fine_tune import fine_tune
from fedflame.training.token_loss import token_losses

P, CPU = 0.4, torch.device("cpu")
ROUTING = torch.tensor([[0, 5], [5, 2], [3, 4], [4, 0], [2, 3], [5, 0]])


def attached(recompute: bool, mapped: bool) -> nn.Module:
    adapted = AdaptedModel(tiny_olmoe(), RANK, ALPHA, [], "experts" if recompute else "none", mapped)
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    return adapted.layers[1].experts


def leaves(experts: nn.Module) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(7)
    x = torch.randn(len(ROUTING), HIDDEN, generator=draws).requires_grad_()
    weights = torch.rand(ROUTING.shape, generator=draws).requires_grad_()
    return {"x": x, "weights": weights, **experts.fedflame.banks(), "s": experts.fedflame.s}


def loop(experts: nn.Module, values: dict[str, Tensor], masks: list[Tensor]) -> Tensor:
    """The definition, row by row in float64: each A sees x with zeros, divided by 1 - p; W sees all of x."""
    gate_up, down, scaling = experts.gate_up_proj.double(), experts.down_proj.double(), ALPHA / RANK
    positions = RoutedRows.sort(ROUTING, len(down)).positions
    rows = []
    for token, chosen in enumerate(ROUTING.tolist()):
        x, y = values["x"][token], torch.zeros(HIDDEN, dtype=torch.float64)
        for slot, e in enumerate(chosen):
            a1, b1, a2, b2 = (values[name][e] for name in BANKS)
            row = positions[token, slot]
            left = x * masks[0][row] / (1 - P)
            gate = gate_up[e, :WIDTH] @ x + scaling * (b1[:WIDTH] @ (a1[:RANK] @ left))
            up = gate_up[e, WIDTH:] @ x + scaling * (b1[WIDTH:] @ (a1[RANK:] @ left))
            hidden = gate * torch.sigmoid(gate) * up
            output = down[e] @ hidden + scaling * (b2 @ (a2 @ (hidden * masks[1][row] / (1 - P))))
            y = y + values["weights"][token, slot] * output
        rows.append(values["s"] * y)
    return torch.stack(rows)


def gradients(y: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(y.dtype)
    return dict(zip(values, torch.autograd.grad(y, list(values.values()), direction), strict=True))


@pytest.mark.parametrize("blocks", [4 * 2**20, 1], ids=["one block", "many blocks"])
@pytest.mark.parametrize("mapped", [False, True], ids=["joined", "apart"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_output_and_every_gradient_equal_the_loop_with_the_same_masks(
    recompute: bool, mapped: bool, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_experts, "BLOCK_BYTES", blocks)
    experts = attached(recompute, mapped)
    experts.fedflame.dropout = P
    with torch.random.fork_rng():
        torch.manual_seed(5)
        masks = draw_masks(ROUTING.numel(), (HIDDEN, WIDTH), P, CPU)
        torch.manual_seed(5)
        values = leaves(experts)
        y = experts(values["x"], ROUTING, values["weights"])
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    expected = loop(experts, exact, masks)
    for got, wanted in (
        ({"y": y}, {"y": expected}),
        (gradients(y, values), gradients(expected, exact)),
    ):
        for name, value in wanted.items():
            error = (got[name].double() - value).abs().max()
            assert error <= 1e-5 * value.abs().max(), name
    assert not torch.allclose(loop(experts, exact, [torch.ones_like(mask) for mask in masks]), expected)


def test_masks_keep_the_share_and_are_drawn_for_each_row_and_width() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = draw_masks(3000, (24, 20), P, CPU)
        again = draw_masks(3000, (24, 20), P, CPU)[0]
    assert (first.shape, second.shape) == ((3000, 24), (3000, 20))
    for mask in (first, second):
        for share in (mask.float().mean(), *mask.float().mean(0)):
            assert abs(float(share) - (1 - P)) < 0.045  # five standard deviations of a column
    for one, other in ((first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, again)):
        both = (one & other).float().mean()
        assert abs(float(both) - (1 - P) ** 2) < 0.01
    assert draw_masks(3000, (24, 20), 0.0, CPU) == []


@pytest.mark.slow
def test_the_mean_over_masks_is_the_product_without_dropout() -> None:
    experts = attached(False, False)
    experts.fedflame.get_parameter("B1").data.zero_()  # what follows is linear in the masks of A2
    values = leaves(experts)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        plain = experts(values["x"], ROUTING, values["weights"])
        experts.fedflame.dropout = P
        drawn = torch.stack([experts(values["x"], ROUTING, values["weights"]) for _ in range(1500)])
    error = (drawn.mean(0) - plain).abs() / (drawn.std(0) / 1500**0.5)
    assert drawn.std(0).min() > 0
    assert error.max() < 4.5


# A client's round


def plan(adapted: AdaptedModel, **changes: Any) -> RoundPlan:
    start = RoundPlan(
        round=1, client=0, seed=0, active_experts=2, rescaler="learned", rescaler_values=torch.ones(2),
        adapter=random_adapter(adapted), learning_rate=0.01, weight_decay=0.1, batch_size=2, max_steps=3,
        lora_dropout=0.3,
    )  # fmt: skip
    return replace(start, **changes)


def update(checkpointing: Checkpointed = "none", **changes: Any) -> ClientUpdate:
    adapted = AdaptedModel(tiny_olmoe(), RANK, ALPHA, ATTENTION, checkpointing)
    rows = random_rows((9, 8, 7, 6, 5), VOCABULARY, seed=3, prompt=3)
    return fine_tune(
        adapted,
        rows,
        plan(adapted, **changes),
        PAD,
    )


def same(one: ClientUpdate, other: ClientUpdate) -> bool:
    values = other.delta.tensors()
    return all(torch.equal(value, values[name]) for name, value in one.delta.tensors().items())


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}], ids=["one", "accumulated"])
@pytest.mark.parametrize("checkpointing", ["none", "experts", "layers"])
def test_the_same_round_has_the_same_masks_however_it_is_computed(
    checkpointing: Checkpointed, changes: dict[str, Any]
) -> None:
    wanted = update(**changes)
    assert same(update(checkpointing, **changes), wanted)
    assert not same(update(checkpointing, lora_dropout=0.0, **changes), wanted)


def test_another_round_client_seed_or_step_has_other_masks() -> None:
    adapted, seeds = tiny_adapted(), []
    for change in ({}, {"round": 2}, {"client": 1}, {"seed": 1}):
        with fine_tune_module._draws(adapted, plan(adapted, **change)) as begin_step:
            for number in range(3):
                begin_step(number)
                seeds.append(torch.initial_seed())
    assert len(set(seeds)) == len(seeds) == 12
    assert update().loss != update(max_steps=1).loss


def test_a_round_leaves_torchs_generator_and_the_model_as_they_were() -> None:
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.ones(2))
    batch, before = random_batch(), torch.random.get_rng_state()
    plain = token_losses(adapted, batch)
    with adapted.training(TOP_K, 0.5):
        assert not torch.equal(token_losses(adapted, batch), plain)
        torch.random.set_rng_state(before)
    assert torch.equal(token_losses(adapted, batch), plain)
    with adapted.training(TOP_K):
        assert torch.equal(token_losses(adapted, batch), plain)
    update()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_masks_take_the_memory_that_the_estimate_says(tmp_path: Path) -> None:
    batch, adapted = random_batch(lengths=(60, 60)), tiny_adapted()
    adapted.load(random_adapter(adapted), torch.ones(2))
    adapted.model.config.save_pretrained(tmp_path)
    shape, tokens = read_model_shape(tmp_path), batch.input_ids.numel()
    kept, said, parameters = [], [], list(adapted.model.parameters())
    for p in (0.0, P):
        with adapted.training(TOP_K, p), torch.random.fork_rng():
            one = Pass(lambda: token_losses(adapted, batch), torch.ones(116), {}, parameters)
            kept.append(saved_bytes(one))
        setting = (shape, TOP_K, RANK, ATTENTION, tokens, "float32")
        said.append(training_memory(*setting, lora_dropout=p > 0).activations)
    assert 0.7 * (kept[1] - kept[0]) < said[1] - said[0] < 1.1 * (kept[1] - kept[0])


def test_attention_drops_what_peft_drops() -> None:
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.ones(2))
    settings = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(ATTENTION), lora_dropout=P)
    stock = get_peft_model(copy.deepcopy(tiny_olmoe()), settings)
    for name, value in adapted.attention.items():
        module, _, half = name.rpartition(".")
        stock.get_submodule(f"base_model.model.{module}.lora_{half}.default").weight.data = value.data.clone()
    for module in stock.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout.train()
    outputs = [
        first_attention(adapted.model, adapted.model, lambda: adapted.training(TOP_K, P)),
        first_attention(stock.base_model.model, stock, torch.no_grad),
    ]
    torch.testing.assert_close(*outputs)


def first_attention(model: nn.Module, run: nn.Module, within: Callable[[], Any]) -> Tensor:
    found: list[Tensor] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(
        lambda module, inputs, output: found.append(output[0].detach())
    )
    with within(), torch.random.fork_rng():
        torch.manual_seed(11)
        run(input_ids=random_batch(lengths=(7, 7)).input_ids)
    hook.remove()
    return found[0]
