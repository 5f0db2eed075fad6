from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.tiny_models import EXPERTS, HIDDEN, TOP_K, WIDTH, random_batch, tiny_olmoe
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedflame.client import token_losses
from fedflame.data.batches import Batch
from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import find_moe_layers

K = {"num_experts_per_tok": TOP_K}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, **K},
    "Qwen2Moe": {
        "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 28,
        "num_experts": EXPERTS,
        **K,
    },
    "Qwen3Moe": {
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "norm_topk_prob": True,
        "head_dim": 8,
        **K,
    },
}
"""Renormalised weights, a shared expert, and both."""


def tiny(family: str, **sizes: Any) -> PreTrainedModel:
    """A tiny random model of any family, the same for the same sizes."""
    common = {
        "vocab_size": 94,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    config = getattr(transformers, f"{family}Config")(**common | sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def test_every_layer_of_olmoe_is_found_in_order_with_its_numbers() -> None:
    model = tiny_olmoe()
    layers = find_moe_layers(model)
    assert [layer.name for layer in layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer, block in zip(layers, model.model.layers, strict=True):
        assert layer.router is block.mlp.gate and layer.experts is block.mlp.experts
        assert (layer.num_experts, layer.num_experts_per_tok) == (EXPERTS, TOP_K)
        assert (layer.hidden_size, layer.expert_width) == (HIDDEN, WIDTH)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 2, TOP_K])
def test_other_families_equal_their_stock_model_built_with_k(family: str, k: int) -> None:
    batch = random_batch()
    model = tiny(family, **FAMILIES[family])
    adapted = AdaptedModel(model, 4, 6.0, ["q_proj"])
    stock = tiny(family, **FAMILIES[family] | {"num_experts_per_tok": k})
    adapted.load(adapted.initial_adapter(0), torch.ones(2))
    with adapted.active_experts(k):
        assert torch.equal(logits(model, batch), logits(stock, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_other_families_is_that_of_transformers(family: str) -> None:
    batch = random_batch()
    model = tiny(family, **FAMILIES[family])
    with torch.no_grad():
        expected = model(**vars(batch)).loss
        adapted = AdaptedModel(model, 4, 6.0, [])
        torch.testing.assert_close(token_losses(adapted, batch).mean(), expected, rtol=1e-5, atol=0)


def test_the_rescaler_leaves_a_shared_expert_alone() -> None:
    model = tiny("Qwen2Moe", **FAMILIES["Qwen2Moe"])
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
    with pytest.raises(UserError) as caught:
        find_moe_layers(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4
    )
    assert refusal(LlamaForCausalLM(config)) == (
        "LlamaForCausalLM is no sparse mixture of experts that transformers routes; try an OLMoE model"
    )


def test_experts_with_another_layout_are_refused_with_every_reason() -> None:
    model = tiny(
        "GptOss", intermediate_size=WIDTH, num_local_experts=EXPERTS, head_dim=8, rope_parameters=None, **K
    )
    assert refusal(model) == (
        "GptOssExperts has expert biases, transposed weights, interleaved gate and up rows: not supported"
    )


def test_a_block_without_a_router_that_owns_top_k_is_refused() -> None:
    model = tiny_olmoe()
    del model.model.layers[0].mlp.gate.top_k
    assert refusal(model) == "OlmoeSparseMoeBlock: 0 routers with a top_k; 1 is needed"


def test_expert_parallelism_is_refused() -> None:
    model = tiny_olmoe()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    assert refusal(model) == "OlmoeExperts has expert parallelism: not supported"


def test_a_model_that_scales_its_logits_is_refused() -> None:
    sizes = {"intermediate_size": WIDTH, "num_local_experts": EXPERTS, **K}
    message = "GraniteMoeForCausalLM changes its logits by logits_scaling: not supported"
    assert refusal(tiny("GraniteMoe", logits_scaling=3.0, **sizes)) == message
    assert len(find_moe_layers(tiny("GraniteMoe", logits_scaling=1.0, **sizes))) == 2


def test_cohere_that_multiplies_its_logits_is_refused() -> None:
    sizes = {"intermediate_size": WIDTH, "num_experts": EXPERTS, "head_dim": 8, **K}
    assert "changes its logits" in refusal(tiny("Cohere2Moe", logit_scale=0.25, **sizes))


def test_a_router_that_does_not_obey_its_top_k_is_refused() -> None:
    """Phi-MoE's picks 2 experts whatever its `top_k` says."""
    assert "Phimoe" in refusal(
        tiny("Phimoe", intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=2)
    )
