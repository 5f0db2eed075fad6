"""A model with LoRA on experts and attention: its gradients, its values in and out, and where it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_models import (
    ALPHA,
    ATTENTION,
    EXPERTS,
    HIDDEN,
    KEY_WIDTH,
    LAYERS,
    RANK,
    SCALING,
    TOP_K,
    WIDTH,
    exact_token_losses,
    merged,
    random_adapter,
    random_batch,
    tiny_adapted,
    tiny_olmoe,
    with_active_experts,
)
from torch import Tensor

from fedflame.errors import UserError
from fedflame.messages import Adapter, half_of
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.token_loss import token_losses


def assert_near(actual: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    error = (actual.double() - expected.double()).abs().max()
    assert error <= relative * expected.abs().max(), f"off by {error:.2e} of {expected.abs().max():.2e}"


def test_attention_lora_equals_a_peft_model_with_the_same_values() -> None:
    adapted, batch = tiny_adapted(), random_batch()
    attention = random_adapter(adapted).attention
    adapted.load(Adapter(adapted.adapter().experts, attention), torch.ones(LAYERS))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ATTENTION))
    reference = get_peft_model(tiny_olmoe(), config).eval()
    weights = reference.state_dict()
    for name, value in attention.items():
        module, part = name.rsplit(".", 1)
        weights[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(value)
    stock = tiny_olmoe()
    with torch.no_grad():
        actual, expected, bare = (
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for model in (adapted.model, reference, stock)
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (actual - bare).abs().max() > 0.05


@pytest.mark.parametrize("k", [1, 3, TOP_K])
def test_every_gradient_follows_by_the_chain_rule_from_the_weights_of_a_merged_model(k: int) -> None:
    adapted, batch = tiny_adapted(), random_batch()
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    oracle = merged(adapted, with_active_experts(k))
    with adapted.active_experts(k):
        loss = token_losses(adapted, batch).mean()
        loss.backward()
    exact = exact_token_losses(oracle, batch).mean()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for lora, layer in zip(adapted.loras, oracle.model.layers, strict=True):
        a1, b1, a2, b2 = (bank.detach().double() for bank in lora.banks().values())
        s = lora.s.item()
        gate, up = layer.mlp.experts.gate_up_proj.grad.chunk(2, dim=1)
        down, down_weight = layer.mlp.experts.down_proj.grad, layer.mlp.experts.down_proj.detach()
        (a_gate, a_up), (b_gate, b_up) = a1.chunk(2, dim=1), b1.chunk(2, dim=1)
        assert_near(lora.A1.grad, SCALING * torch.cat([b_gate.mT @ gate, b_up.mT @ up], dim=1))
        assert_near(lora.B1.grad, SCALING * torch.cat([gate @ a_gate.mT, up @ a_up.mT], dim=1))
        assert_near(lora.A2.grad, s * SCALING * b2.mT @ down)
        assert_near(lora.B2.grad, s * SCALING * down @ a2.mT)
        assert lora.s.grad.item() == pytest.approx(float((down * down_weight).sum() / s), rel=2e-5, abs=1e-6)
    weights = dict(oracle.named_parameters())
    for name, parameter in adapted.attention.items():
        module, part = name.rsplit(".", 1)
        gradient = weights[f"{module}.weight"].grad
        a, b = (adapted.attention[f"{module}.{other}"].detach().double() for other in "AB")
        assert_near(parameter.grad, SCALING * (b.mT @ gradient if part == "A" else gradient @ a.mT))


def test_only_banks_rescalers_and_attention_lora_are_trained() -> None:
    adapted = tiny_adapted()
    trained = {id(parameter) for parameter in adapted.model.parameters() if parameter.requires_grad}
    mine = [bank for lora in adapted.loras for bank in [*lora.banks().values(), lora.s]]
    assert trained == {id(parameter) for parameter in [*mine, *adapted.attention.values()]}
    assert len(mine) == 5 * LAYERS and len(adapted.attention) == 2 * len(ATTENTION) * LAYERS


def test_the_adapter_is_named_and_shaped_as_the_messages_say() -> None:
    adapter = tiny_adapted().adapter()
    sizes = {"A1": (2 * RANK, HIDDEN), "B1": (2 * WIDTH, RANK), "A2": (RANK, WIDTH), "B2": (HIDDEN, RANK)}
    assert {name: tuple(value.shape) for name, value in adapter.experts.items()} == {
        f"{layer}.{bank}": (EXPERTS, *size) for layer in range(LAYERS) for bank, size in sizes.items()
    }
    outputs = {"q_proj": HIDDEN, "k_proj": KEY_WIDTH, "v_proj": KEY_WIDTH, "o_proj": HIDDEN}
    modules = {
        f"model.layers.{layer}.self_attn.{name}": size
        for layer in range(LAYERS)
        for name, size in outputs.items()
    }
    assert {name: tuple(value.shape) for name, value in adapter.attention.items()} == {
        f"{module}.A": (RANK, HIDDEN) for module in modules
    } | {f"{module}.B": (size, RANK) for module, size in modules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_values_are_float32_whatever_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    adapted = AdaptedModel(tiny_olmoe(intermediate_size=40).to(dtype), 8, ALPHA, ATTENTION)
    for adapter in (adapted.adapter(), adapted.initial_adapter(0)):
        assert {value.dtype for value in adapter.tensors().values()} == {torch.float32}
    assert adapted.rescaler_values().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_values_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    adapted = AdaptedModel(tiny_olmoe(intermediate_size=40).to(dtype), 8, ALPHA, ATTENTION)
    adapter = random_adapter(adapted)
    adapted.load(adapter, torch.tensor([0.7, 1.3]))
    back = adapted.adapter().tensors()
    assert all(torch.equal(back[name], value) for name, value in adapter.tensors().items())
    assert torch.equal(adapted.rescaler_values(), torch.tensor([0.7, 1.3]))


def test_what_was_read_out_does_not_change_with_the_model() -> None:
    adapted = tiny_adapted()
    adapter = random_adapter(adapted)
    adapted.load(adapter, torch.tensor([0.7, 1.3]))
    read, s = adapted.adapter().tensors(), adapted.rescaler_values()
    adapted.load(adapted.initial_adapter(0), torch.ones(LAYERS))
    assert all(torch.equal(read[name], value) for name, value in adapter.tensors().items())
    assert torch.equal(s, torch.tensor([0.7, 1.3]))


def test_what_was_learned_is_the_difference_to_the_start_and_stays_so() -> None:
    adapted = tiny_adapted()
    start, now = random_adapter(adapted, seed=1), random_adapter(adapted, seed=2)
    adapted.load(now, torch.ones(LAYERS))
    learned = adapted.learned_since(start).tensors()
    adapted.load(start, torch.ones(LAYERS))
    for name, value in learned.items():
        assert torch.equal(value, now.tensors()[name] - start.tensors()[name]) and not value.requires_grad


def test_the_model_keeps_no_hold_on_what_was_loaded() -> None:
    adapted = tiny_adapted()
    adapter = random_adapter(adapted)
    before = {name: value.clone() for name, value in adapter.tensors().items()}
    adapted.load(adapter, torch.ones(LAYERS))
    with torch.no_grad():
        for parameter in adapted.model.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in adapter.tensors().items())


# A frozen half


@pytest.mark.parametrize("trainable", ["A", "B"])
def test_gradients_reach_the_half_that_is_trained_and_are_those_of_both(trainable: Any) -> None:
    adapted, batch = tiny_adapted(), random_batch()
    adapted.load(random_adapter(adapted), torch.ones(LAYERS))

    def gradients() -> dict[str, Tensor | None]:
        adapted.model.zero_grad()
        token_losses(adapted, batch).mean().backward()
        banks = [(lora, name, bank) for lora in adapted.loras for name, bank in lora.banks().items()]
        return {f"{lora.index}.{name}": bank.grad for lora, name, bank in banks} | {
            name: value.grad for name, value in adapted.attention.items()
        }

    both = gradients()
    adapted.set_trainable(trainable)
    half = gradients()
    for name, gradient in both.items():
        if half_of(name) == trainable:
            assert torch.equal(half[name], gradient)
        else:
            assert half[name] is None
    adapted.set_trainable("both")
    assert all(torch.equal(gradient, both[name]) for name, gradient in gradients().items())


def test_the_initial_adapter_depends_on_the_seed_alone() -> None:
    adapted, other = tiny_adapted(), tiny_adapted(seed=9)
    adapted.load(random_adapter(adapted), torch.ones(LAYERS))
    torch.rand(3)
    first, again, different = (
        m.initial_adapter(seed).tensors() for m, seed in ((adapted, 4), (other, 4), (other, 5))
    )
    for name, value in first.items():
        assert torch.equal(value, again[name])
        is_a = name.endswith(("A1", "A2", ".A"))
        assert bool(value.any()) == is_a
        assert torch.equal(value, different[name]) != is_a


def test_every_module_and_layer_starts_from_its_own_a_within_the_peft_bounds() -> None:
    adapter = tiny_adapted().initial_adapter(4)
    assert not torch.equal(adapter.experts["0.A1"], adapter.experts["1.A1"])
    matrices = [value for name, value in adapter.attention.items() if name.endswith(".A")]
    assert len({tuple(value.flatten().tolist()) for value in matrices}) == len(ATTENTION) * LAYERS
    everything = torch.stack(matrices)
    assert 0.97 * HIDDEN**-0.5 < everything.abs().max() <= HIDDEN**-0.5
    assert float(everything.std()) == pytest.approx((HIDDEN * 3) ** -0.5, rel=0.05)


def test_attaching_and_drawing_leave_the_global_generator_alone() -> None:
    model, before = tiny_olmoe(), torch.get_rng_state()
    AdaptedModel(model, RANK, ALPHA, ATTENTION).initial_adapter(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_target_modules_only_the_experts_carry_lora() -> None:
    adapted = tiny_adapted(target_modules=())
    assert adapted.attention == {}
    assert adapted.initial_adapter(0).attention == {}


@pytest.mark.parametrize("name", ["nope", "embed_tokens", "proj", "self_attn"])
def test_target_modules_that_the_model_lacks_are_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny_adapted(target_modules=("q_proj", name))
    assert str(caught.value) == (
        f"adapter.target_modules {name!r}: OlmoeForCausalLM has no linear map of this name"
    )


# Ranks below the model's


@pytest.mark.parametrize("rank", [1, 3])
def test_fewer_ranks_compute_what_zeros_in_the_others_do_at_the_scaling_of_the_model(rank: int) -> None:
    adapted, batch = tiny_adapted(), random_batch()
    cut, s = random_adapter(adapted).with_rank(rank), torch.tensor([0.7, 1.3])
    results = []
    for adapter in (cut, cut.with_rank(RANK)):
        adapted.load(adapter, s)
        assert adapted.adapter().rank == adapter.rank
        token_losses(adapted, batch).mean().backward()
        gradients = {name: value.grad for name, value in adapted.attached().tensors().items()}
        adapted.model.zero_grad()
        with torch.no_grad():
            results.append((token_losses(adapted, batch), Adapter.from_tensors(gradients)))
    (losses, gradients), (padded_losses, padded_gradients) = results
    assert_near(losses, padded_losses)
    for name, value in padded_gradients.with_rank(rank).tensors().items():
        assert_near(gradients.tensors()[name], value, 1e-4)


def test_after_fewer_ranks_the_model_takes_all_again_and_starts_anew_with_all() -> None:
    adapted, batch = tiny_adapted(), random_batch()
    full, start = random_adapter(adapted), adapted.initial_adapter(5)
    with torch.no_grad():
        adapted.load(full, torch.ones(LAYERS))
        before = token_losses(adapted, batch)
        adapted.load(full.with_rank(2), torch.ones(LAYERS))
        assert not torch.equal(token_losses(adapted, batch), before)
        again = adapted.initial_adapter(5).tensors()
        adapted.load(full, torch.ones(LAYERS))
        assert torch.equal(token_losses(adapted, batch), before)
    assert all(torch.equal(value, again[name]) for name, value in start.tensors().items())


def test_more_ranks_than_the_model_has_are_refused() -> None:
    adapted = tiny_adapted()
    with pytest.raises(UserError, match=r"adapter value .* is .*; the model needs"):
        adapted.load(random_adapter(adapted).with_rank(RANK + 1), torch.ones(LAYERS))
