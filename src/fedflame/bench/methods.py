"""The methods that the benchmark compares on one MoE block, forward and backward.

All methods share one set of frozen weights, of which `ours` has a copy with its adapter (`moe.projection`).
Methods with LoRA hold their adapters in float32 and cast them in each forward, as a training step does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.functional import grouped_mm
from transformers import OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedflame.bench.block import Geometry, random_rows, sharing_copy
from fedflame.config.words import Checkpointed
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.rescaler import rescale
from fedflame.moe.routed_rows import RoutedRows

LORA_ALPHA = 16.0
COMPOSED = "fedflame-bench-composed"


@dataclass(frozen=True)
class Pass:
    """One method on one input: a forward, and a backward from the gradient `d_output` to all `leaves`."""

    forward: Callable[[], Tensor]
    d_output: Tensor
    leaves: Mapping[str, Tensor]
    parameters: Sequence[Tensor]

    def reset(self) -> None:
        """Free the gradients of the last `run`."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def run(self) -> Tensor:
        """Run forward and backward; the gradients are in `leaves`. Return the output."""
        output = self.forward()
        output.backward(self.d_output)
        return output.detach()


@dataclass(frozen=True)
class Method:
    """A method: how it attaches to a copy of the frozen model, and how it prepares a pass."""

    description: str
    attach: Callable[[OlmoeForCausalLM, Geometry], None]
    prepare: Callable[[OlmoeForCausalLM, Geometry, int, int], Pass]

    def build(self, frozen: OlmoeForCausalLM, geometry: Geometry) -> OlmoeForCausalLM:
        """Return a model with the weights of `frozen`, ready for `prepare(model, geometry, tokens, k)`."""
        model = sharing_copy(frozen)
        self.attach(model, geometry)
        nn.Module.to(model, geometry.device)  # moves what PEFT has attached
        return model


def _attach_ours(
    model: OlmoeForCausalLM,
    geometry: Geometry,
    gradient_checkpointing: Checkpointed = "none",
    mapped: bool = False,
) -> None:
    adapted = AdaptedModel(model, geometry.r, LORA_ALPHA, (), gradient_checkpointing, mapped)
    zero = adapted.initial_adapter(0)
    generator = torch.Generator().manual_seed(1)
    # B is not zero: otherwise half of the gradients would be zero in the comparison with `composed`.
    banks = {name: 0.02 * torch.randn(bank.shape, generator=generator) for name, bank in zero.experts.items()}
    adapted.load(Adapter(banks, {}), torch.ones(1))
    for lora in adapted.loras:
        lora.s.requires_grad_(False)  # fixed, as for k = K


def _attach_composed(model: OlmoeForCausalLM, geometry: Geometry) -> None:
    _attach_ours(model, geometry, mapped=True)  # the weights stay where they are
    model.set_experts_implementation(COMPOSED)


def _attach_nothing(model: OlmoeForCausalLM, geometry: Geometry) -> None:
    model.set_experts_implementation("grouped_mm")


def _attach_peft(model: OlmoeForCausalLM, geometry: Geometry) -> None:
    """Attach PEFT's LoRA. Gate and up share one A: a quarter fewer parameters than with one LoRA each."""
    model.set_experts_implementation("grouped_mm")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=geometry.r, lora_alpha=int(LORA_ALPHA), target_parameters=targets)
    with torch.random.fork_rng():
        inject_adapter_in_model(config, model)
    cast_adapter_dtype(model, "default")  # to float32, as `get_peft_model` does


def _composed_experts(experts: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute base and low-rank products separately with grouped_mm and plain autograd."""
    lora: Any = experts.fedflame
    a1, b1, a2, b2 = (bank.to(x.dtype) for bank in lora.banks().values())
    rows = RoutedRows.sort(top_k_index, len(a1))
    offsets = rows.offsets

    def times(left: Tensor, weights: Tensor) -> Tensor:
        return grouped_mm(left, weights.mT, offs=offsets)

    routed = x[rows.tokens]
    gate, up = times(routed, experts.get_parameter("gate_up_proj")).chunk(2, dim=-1)
    gate_low, up_low = times(routed, a1).chunk(2, dim=-1)
    gate_b, up_b = b1.chunk(2, dim=1)
    gate = gate + lora.scaling * times(gate_low.contiguous(), gate_b)
    up = up + lora.scaling * times(up_low.contiguous(), up_b)
    activation = nn.functional.silu(gate) * up
    output = times(activation, experts.get_parameter("down_proj"))
    output = output + lora.scaling * times(times(activation, a2), b2)
    weights = rescale(top_k_weights, lora.s).reshape(-1)[rows.order].unsqueeze(1)
    per_token: Tensor = (output * weights)[rows.positions].sum(1)
    return per_token.to(x.dtype)


ALL_EXPERTS_FUNCTIONS.register(COMPOSED, _composed_experts)


def _block_pass(model: OlmoeForCausalLM, geometry: Geometry, tokens: int, k: int) -> Pass:
    block: Any = model.model.layers[0].mlp
    x, d_output = _input_and_gradient(geometry, tokens)
    trained = {name: value for name, value in block.named_parameters() if value.requires_grad}

    def forward() -> Tensor:
        increment_version(trained.values())  # as after an optimizer step: what was cast is out of date
        block.gate.top_k = k
        output: Tensor = block(x.unsqueeze(0))
        return output.squeeze(0)

    return Pass(forward, d_output, {"x": x, **trained}, list(block.parameters()))


def _gemm_pass(model: OlmoeForCausalLM, geometry: Geometry, tokens: int, k: int) -> Pass:
    block: Any = model.model.layers[0].mlp
    x, d_output = _input_and_gradient(geometry, tokens)
    block.gate.top_k = k
    rows = RoutedRows.sort(block.gate(x)[2], geometry.num_experts)
    routed = x.detach()[rows.tokens].requires_grad_()
    count, width = len(rows.tokens), geometry.intermediate_size
    activation = random_rows(geometry, count, width, seed=2)
    d_inner = random_rows(geometry, count, 2 * width, seed=3)
    experts, offsets = block.experts, rows.offsets

    def forward() -> Tensor:
        output: Tensor = _FourProducts.apply(  # type: ignore[no-untyped-call]
            routed, activation, d_inner, experts.gate_up_proj, experts.down_proj, offsets
        )
        return output

    return Pass(forward, d_output[rows.tokens], {"x": routed}, list(experts.parameters()))


class _FourProducts(torch.autograd.Function):
    """Computes only the base's two products of the forward and its two of the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        routed: Tensor,
        activation: Tensor,
        d_inner: Tensor,
        gate_up: Tensor,
        down: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        ctx.operands = d_inner, gate_up, down, offsets
        grouped_mm(routed, gate_up.mT, offs=offsets)
        return grouped_mm(activation, down.mT, offs=offsets)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        d_inner, gate_up, down, offsets = ctx.operands
        grouped_mm(d_output, down, offs=offsets)
        return grouped_mm(d_inner, gate_up, offs=offsets), None, None, None, None, None


def _input_and_gradient(geometry: Geometry, tokens: int) -> tuple[Tensor, Tensor]:
    x, d_output = (random_rows(geometry, tokens, geometry.hidden_size, seed) for seed in (0, 1))
    return x.requires_grad_(), d_output


METHODS = {
    "ours": Method("fedflame's experts function", _attach_ours, _block_pass),
    "ours-checkpointed": Method(
        "the same with training.gradient_checkpointing = experts",
        partial(_attach_ours, gradient_checkpointing="experts"),
        _block_pass,
    ),
    "frozen": Method("no LoRA, gradient to the input only", _attach_nothing, _block_pass),
    "gemm": Method("the base's four products on sorted rows", _attach_nothing, _gemm_pass),
    "composed": Method("split LoRA by grouped_mm and plain autograd", _attach_composed, _block_pass),
    "peft": Method("PEFT's target_parameters", _attach_peft, _block_pass),
}
