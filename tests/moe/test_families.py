from __future__ import annotations

import pytest
import torch
from tests.families import tiny
from tests.refusals import refusal_of
from tests.tiny_models import ALPHA, EXPERTS, HIDDEN, RANK, SCALING, TOP_K, WIDTH, random_adapter, tiny_olmoe
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import find_moe_layers


def test_every_layer_of_olmoe_is_found_in_order_with_its_numbers() -> None:
    model = tiny_olmoe()
    layers = find_moe_layers(model)
    assert [layer.name for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer, block in zip(layers, model.model.layers, strict=True):
        assert layer.router is block.mlp.gate and layer.experts is block.mlp.experts
        assert (layer.num_experts, layer.num_experts_per_tok) == (EXPERTS, TOP_K)
        assert (layer.hidden_size, layer.expert_width) == (HIDDEN, WIDTH)


def test_the_rescaler_leaves_a_shared_expert_alone() -> None:
    model = tiny("qwen2_moe")
    adapted = AdaptedModel(model, 4, 6.0, [])
    block, shared = model.model.layers[0].mlp, model.model.layers[0].mlp.shared_expert
    x = torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(3))
    zero = adapted.adapter()
    with torch.no_grad():
        adapted.load(zero, torch.tensor([0.0, 1.0]))
        alone = torch.sigmoid(block.shared_expert_gate(x)) * shared(x)
        torch.testing.assert_close(block(x), alone, rtol=0, atol=1e-6)
        adapted.load(zero, torch.ones(2))
        once = block(x)
        adapted.load(zero, torch.tensor([2.0, 1.0]))
        torch.testing.assert_close(block(x) - alone, 2 * (once - alone), rtol=1e-4, atol=1e-5)
        assert (once - alone).abs().max() > 0.1


def refusal(model: PreTrainedModel) -> str:
    return refusal_of(find_moe_layers, model)


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4
    )
    assert refusal(LlamaForCausalLM(config)) == (
        "LlamaForCausalLM is no sparse mixture of experts that transformers routes; try an OLMoE model"
    )


def test_a_norm_after_each_expert_is_refused() -> None:
    model = tiny_olmoe()
    model.model.layers[1].mlp.experts.has_post_expert_norm = True
    assert refusal(model) == "OlmoeExperts has a norm after each expert: not supported"


def test_layers_that_differ_in_their_number_of_experts_are_refused() -> None:
    model = tiny_olmoe()
    model.model.layers[1].mlp = tiny_olmoe(num_experts=5).model.layers[1].mlp
    assert "differ in their number of experts" in refusal(model)


def test_a_block_without_a_router_that_owns_top_k_is_refused() -> None:
    model = tiny_olmoe()
    del model.model.layers[0].mlp.gate.top_k
    assert refusal(model) == "OlmoeSparseMoeBlock: 0 routers with a top_k; 1 is needed"


def test_expert_parallelism_is_refused() -> None:
    model = tiny_olmoe()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    assert refusal(model) == "OlmoeExperts has expert parallelism: not supported"


LAYOUTS = {
    "gpt_oss": "transposed, biased, gate and up alternate, clamped",
    "aria_text": "transposed",
    "nemotron_h": "no gate",
}


def expert_by_definition(
    family: str, experts: nn.Module, e: int, banks: dict[str, Tensor], x: Tensor
) -> Tensor:
    """One expert on one token in float64, written from the family's own formulas."""
    c, weights = SCALING, {name: value[e].double() for name, value in experts.named_parameters(recurse=False)}
    a1, b1, a2, b2 = (bank[e].double() for bank in banks.values())
    if family == "nemotron_h":
        hidden = torch.relu(weights["up_proj"] @ x + c * b1 @ (a1 @ x)) ** 2
        return weights["down_proj"] @ hidden + c * b2 @ (a2 @ hidden)
    width, r = a2.shape[1], a2.shape[0]
    both = weights["gate_up_proj"].T @ x
    if family == "gpt_oss":
        both = both + weights["gate_up_proj_bias"]
        gate, up = both[0::2], both[1::2]
    else:
        gate, up = both[:width], both[width:]
    gate, up = gate + c * b1[:width] @ (a1[:r] @ x), up + c * b1[width:] @ (a1[r:] @ x)
    if family == "aria_text":
        hidden = gate * torch.sigmoid(gate) * up
        return weights["down_proj"].T @ hidden + c * b2 @ (a2 @ hidden)
    gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
    hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return weights["down_proj"].T @ hidden + weights["down_proj_bias"] + c * b2 @ (a2 @ hidden)


@pytest.mark.parametrize("family", LAYOUTS)
def test_experts_of_another_layout_equal_their_definition(family: str) -> None:
    adapted = AdaptedModel(tiny(family), RANK, ALPHA, [])
    adapted.load(random_adapter(adapted, scale=0.5), torch.tensor([1.0, 0.7]))
    layer, routing = adapted.layers[1], [[0, 5], [5, 2], [3, 4], [4, 0], [2, 3]]
    generator = torch.Generator().manual_seed(4)
    x, p = torch.randn(5, layer.hidden_size, generator=generator), torch.rand(5, 2, generator=generator)
    with torch.no_grad():
        actual = layer.experts(x, torch.tensor(routing), p)
    banks = layer.experts.fedflame.banks()
    for token, chosen in enumerate(routing):
        terms = [
            p[token, slot].double() * expert_by_definition(family, layer.experts, e, banks, x[token].double())
            for slot, e in enumerate(chosen)
        ]
        torch.testing.assert_close(actual[token].double(), 0.7 * sum(terms), rtol=1e-4, atol=1e-4)
