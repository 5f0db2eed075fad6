"""FLOPs and parameters of tiny models of five families: those that torch counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.cost.shipped_configs import BATCH, LENGTH, QKVO, RANK, from_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from fedflame.cost.flops import forward_flops_per_token, training_flops_per_token
from fedflame.cost.model_shape import ModelShape, base_parameters, read_model_shape

# No two sizes of one family are equal (OLMoE alone ties its query width to the hidden size).
COMMON: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 53,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 10, "num_experts": 11, "num_experts_per_tok": 8},
    "mixtral": {"intermediate_size": 10, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {
        "moe_intermediate_size": 10,
        "intermediate_size": 17,
        "num_experts": 11,
        "num_experts_per_tok": 4,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "moe_intermediate_size": 10,
        "intermediate_size": 17,
        "shared_expert_intermediate_size": 13,
        "num_experts": 11,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 10,
        "intermediate_size": 17,
        "n_shared_experts": 2,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 6,
        "q_lora_rank": 15,
        "kv_lora_rank": 14,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
}


class ExpertsWithLora(nn.Module):
    """Expert by expert, the plainest form of the method: what the counted FLOPs are held against."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        (e, hidden, inner) = base.down_proj.shape
        self.base = base
        self.a1 = nn.Parameter(torch.randn(e, 2 * RANK, hidden))
        self.b1 = nn.Parameter(torch.randn(e, 2 * inner, RANK))
        self.a2 = nn.Parameter(torch.randn(e, RANK, inner))
        self.b2 = nn.Parameter(torch.randn(e, hidden, RANK))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for e in range(self.a1.shape[0]):
            token, slot = torch.where(index == e)
            h = x[token]
            z_gate, z_up = (h @ self.a1[e].T).chunk(2, dim=-1)
            b_gate, b_up = self.b1[e].chunk(2)
            gate, up = (h @ self.base.gate_up_proj[e].T).chunk(2, dim=-1)
            inner = torch.sigmoid(gate + z_gate @ b_gate.T) * (up + z_up @ b_up.T)
            out = inner @ self.base.down_proj[e].T + inner @ self.a2[e].T @ self.b2[e].T
            rows.append(torch.zeros_like(x).index_add(0, token, out * weights[token, slot, None]))
        return torch.stack(rows).sum(0)


def tiny_model(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | changes))
    return from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )


def shape_of(family: str, folder: Path) -> ModelShape:
    tiny_model(family).config.save_pretrained(folder)
    return read_model_shape(folder)


def set_top_k(model: Any, k: int) -> None:
    for module in model.modules():
        if hasattr(module, "top_k") and not hasattr(module, "experts"):
            module.top_k = k


def attach(model: Any, targets: tuple[str, ...]) -> Any:
    """Expert LoRA on every expert, attention LoRA on the targets; everything else frozen."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = ExpertsWithLora(layer.mlp.experts)
    if not targets:
        return model
    banks = [p for p in model.parameters() if p.requires_grad]
    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules=list(targets)))
    for bank in banks:
        bank.requires_grad_(True)
    return wrapped


def counted(model: Any, backward: bool, **arguments: Any) -> int:
    """FLOPs of torch's counter for one batch, without the rotation angles (a product [d/2,1] x [1,S])."""
    tokens = torch.randint(0, 53, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens, use_cache=False, **arguments).logits
        if backward:
            logits.pow(2).sum().backward()
    total: int = counter.get_total_flops()
    by_module = counter.get_flop_counts()
    return total - sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith("rotary_emb"))


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_forward_of_olmoe_equals_torchs_counter(k: int, tmp_path: Path) -> None:
    shape = shape_of("olmoe", tmp_path)
    model = tiny_model("olmoe")
    set_top_k(model, k)
    expected = forward_flops_per_token(shape, k, 0, (), LENGTH)
    assert counted(model, backward=False) == BATCH * LENGTH * expected.total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["none", "all", "first", "second", "third", "output"])
def test_lora_flops_equal_torchs_counter(family: str, attention: str, tmp_path: Path) -> None:
    shape = shape_of(family, tmp_path)
    names = tuple(p.name for p in shape.attention[0])
    single = {"first": names[:1], "second": names[1:2], "third": names[2:3], "output": names[-1:]}
    targets = {"none": (), "all": names, **single}[attention]
    model = attach(tiny_model(family), targets)
    set_top_k(model, 2)
    for backward, function in ((False, forward_flops_per_token), (True, training_flops_per_token)):
        assert counted(model, backward) == BATCH * LENGTH * function(shape, 2, RANK, targets, LENGTH).total


@pytest.mark.parametrize("backward", [False, True])
def test_head_runs_at_labelled_positions(backward: bool, tmp_path: Path) -> None:
    shape = shape_of("olmoe", tmp_path)
    model = attach(tiny_model("olmoe"), QKVO)
    function = training_flops_per_token if backward else forward_flops_per_token
    expected = function(shape, 8, RANK, QKVO, LENGTH, labelled_share=3 / LENGTH).total
    assert counted(model, backward, logits_to_keep=3) == pytest.approx(BATCH * LENGTH * expected, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_base_parameters_are_those_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    expected = sum(p.numel() for p in model.parameters())
    assert base_parameters(read_model_shape(tmp_path)) == expected
