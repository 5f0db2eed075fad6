"""Costs of real models and by hand: parameters, FLOPs, memory and bytes, and a table of tiers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from tests.cost.shipped_configs import MODELS, OLMOE, QKVO, RANK, ROOT, from_config
from tests.tiny_models import EXPERTS, HIDDEN, LAYERS, WIDTH, tiny_adapted
from transformers import AutoConfig

from fedflame.config.words import Dtype
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.flops import forward_flops_per_token, training_flops_per_token
from fedflame.cost.memory import least_evaluation_memory, least_training_memory, training_memory
from fedflame.cost.model_shape import base_parameters, read_model_shape
from fedflame.cost.tiers import Tier, tier_costs


@pytest.mark.parametrize(
    ("name", "family"),
    [("OLMoE-1B-7B-0924", "olmoe"), ("Mixtral-8x7B", "mixtral"), ("Qwen3-30B-A3B", "qwen3_moe")],
)
def test_shipped_configs_describe_the_real_models(name: str, family: str) -> None:
    config = AutoConfig.from_pretrained(MODELS / name)
    assert config.model_type == family
    with torch.device("meta"):
        model = from_config(config)
    parameters = base_parameters(read_model_shape(MODELS / name))
    assert parameters == sum(p.numel() for p in model.parameters())
    published = {"olmoe": 6.92e9, "mixtral": 46.7e9, "qwen3_moe": 30.5e9}[family]
    assert parameters == pytest.approx(published, rel=2e-3)


def test_numbers_by_hand(tmp_path: Path) -> None:
    """One layer: H 6, I 5, 7 experts, 2 heads of 4 and one key-value head, vocabulary 11; R 2, S 3, k 2."""
    config = {
        "model_type": "mixtral",
        "hidden_size": 6,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "vocab_size": 11,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = read_model_shape(tmp_path / "config.json")
    # q 6x8, k 6x4, v 6x4, o 8x6 = 144 multiply-adds; scores 3*2*4 twice; router 6*7; three 6x5 matrices
    # for each of two experts; LoRA 3*2*(6+5) for each; attention LoRA on q and o 2*(6+8) each; head 6*11.
    forward = forward_flops_per_token(shape, 2, 2, ("q_proj", "o_proj"), 3)
    assert astuple(forward) == (288, 96, 84, 360, 264, 112, 0, 0, 132)
    assert forward.total == 1336
    assert forward_flops_per_token(shape, 2, 2, ("q_proj", "o_proj"), 3, head=False).total == 1336 - 132
    # Backward, layer 0: base o 2*48; d(softmax) and dq 2*24 each; router and experts once; expert LoRA
    # twice; q LoRA 2*2*(6+8+8), o LoRA 2*2*(8+6)*2; head once.
    training = training_flops_per_token(shape, 2, 2, ("q_proj", "o_proj"), 3)
    assert astuple(training) == (288 + 96, 96 + 96, 168, 720, 792, 112 + 88 + 112, 0, 0, 264)
    # Experts: 7*(A1 4x6, B1 10x2, A2 2x5, B2 6x2) = 7*66; attention: 2*(6+8)*2.
    size = adapter_parameters(shape, 2, ("q_proj", "o_proj"))
    assert (size.experts, size.attention, size.total) == (462, 56, 518)
    assert (size.bytes_down, size.bytes_up("float32")) == (4 * 519, 4 * 519 + 8 * 7)
    assert size.bytes_up("bfloat16") == 2 * 518 + 4 + 8 * 7
    # A scale for each of A1, B1, A2, B2 of 7 experts, and of A, B of q and o.
    assert size.bytes_up("int8") == 518 + 4 * (4 * 7 + 4) + 4 + 8 * 7
    # Embedding and head 11*6 each, attention 144, experts 7*90, router 42, three norms of 6.
    assert base_parameters(shape) == 132 + 144 + 630 + 42 + 18
    memory = training_memory(shape, 2, 2, ("q_proj", "o_proj"), tokens_per_step=3, dtype="bfloat16")
    # Per token: 43*6 around; 2 experts keep 2*5 + 3*2 and pass 2*6 + 3*5 values of 2 bytes; logits 11*10.
    activations = 3 * (258 + 64 + 108 + 110)
    # Room beside 7 experts, whose ranks are filled up to 8: 26 x 22 for 10 x 6, 14 x 13 for 6 x 5.
    base = 2 * (966 + 7 * (26 * 22 - 60 + 14 * 13 - 30))
    assert astuple(memory) == (base, 4 * 518, 4 * 518, 8 * 518, activations)
    setting = (shape, 2, 2, ("q_proj", "o_proj"), 3, "bfloat16", 1.0)
    # 2 bytes each: without the 2*5 of two experts before the activation; with the layer's input of 6.
    assert training_memory(*setting, "experts").activations == activations - 3 * 2 * 2 * 10
    assert training_memory(*setting, "layers").activations == activations + 3 * 2 * 6
    # For each of 3 tokens and 9 of its sequence a number of 2 bytes, and two truths.
    assert training_memory(*setting, mask_width=9).activations == activations + 3 * 9 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_least_that_training_takes_is_in_the_tensors_of_the_model(
    dtype: Dtype, tiny_folder: Path
) -> None:
    adapted = tiny_adapted(r=RANK)
    banks = sum(value.numel() for value in adapted.attached().tensors().values())
    frozen = sum(value.numel() for value in adapted.model.parameters() if not value.requires_grad)
    shape, width = read_model_shape(tiny_folder), 4 if dtype == "float32" else 2
    filled = 4 if dtype == "float32" else 8  # RANK is 3
    weights = [(2 * WIDTH, HIDDEN, 2 * filled), (HIDDEN, WIDTH, filled)]
    room = LAYERS * EXPERTS * sum((out + n) * (into + n) - out * into for out, into, n in weights)
    if dtype == "float32":
        held = [part for lora in adapted.loras for part in (lora.experts.up, lora.experts.down)]
        assert sum(part.buffer.numel() - part.weight.numel() for part in held) == room
    evaluated = least_evaluation_memory(shape, RANK, QKVO, dtype)
    assert evaluated == width * (frozen + room) + 4 * banks
    trained = least_training_memory(shape, RANK, QKVO, dtype)
    assert trained == evaluated + 2 * 4 * banks + 4 * banks // LAYERS
    assert least_training_memory(shape, RANK, QKVO, dtype, True) == evaluated + 3 * 4 * banks


def test_adapter_of_olmoe_is_that_of_the_banks() -> None:
    size = adapter_parameters(read_model_shape(OLMOE), 16, QKVO)
    assert size.experts == 16 * 64 * (32 * 2048 + 2048 * 16 + 16 * 1024 + 2048 * 16) == 150_994_944
    assert size.attention == 16 * 4 * 16 * (2048 + 2048)


@pytest.mark.parametrize("model", ["OLMoE-1B-7B-0924", "Mixtral-8x7B"])
def test_halves_of_an_adapter_are_those_of_the_banks_and_together_the_whole(model: str) -> None:
    shape = read_model_shape(MODELS / model / "config.json")
    whole, a, b = (adapter_parameters(shape, 5, ("q_proj", "k_proj"), half) for half in ("both", "A", "B"))
    assert (a.experts + b.experts, a.attention + b.attention) == (whole.experts, whole.attention)
    h, inner = shape.hidden_size, shape.expert_size
    assert a.experts == shape.moe_layers * shape.num_experts * 5 * (2 * h + inner)
    assert b.experts == shape.moe_layers * shape.num_experts * 5 * (2 * inner + h)
    heads = [p.fan_out for p in shape.attention[0] if p.name in ("q_proj", "k_proj")]
    ranks = 5 * len(shape.sparse_layers)
    assert (a.attention, b.attention) == (ranks * 2 * h, ranks * sum(heads))


def test_of_halves_that_take_turns_the_larger_one_counts_up() -> None:
    shape = read_model_shape(OLMOE)
    a, b = (adapter_parameters(shape, 16, (), half) for half in ("A", "B"))
    assert a.bytes_up("float32") > b.bytes_up("float32")
    up = [
        tier_costs(shape, [Tier(8, 16, 1)], 16, (), 128, halves=halves)[0].bytes_up
        for halves in (("B",), ("B", "A"))
    ]
    assert up == [b.bytes_up("float32"), a.bytes_up("float32")]


def test_tier_costs() -> None:
    shape = read_model_shape(OLMOE)
    tiers = [Tier(8, 16, 3), Tier(2, 16, 1), Tier(1, 16, 2), Tier(8, 5, 1)]
    costs = tier_costs(shape, tiers, 16, QKVO, 128)
    assert [Tier(c.active_experts, c.rank, c.clients) for c in costs] == tiers
    assert costs[0].relative_to_full == 1.0
    for cost in costs:
        size = adapter_parameters(shape, cost.rank, QKVO)
        forward = forward_flops_per_token(shape, cost.active_experts, cost.rank, QKVO, 128).total
        training = training_flops_per_token(shape, cost.active_experts, cost.rank, QKVO, 128).total
        assert cost.bytes_down == size.bytes_down
        assert cost.forward_flops_per_token == forward
        assert cost.relative_to_full == forward / costs[0].forward_flops_per_token
        assert cost.training_flops_per_token == training
        assert cost.bytes_up - cost.bytes_down == 8 * 16 * 64


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys, fedflame.cost.run_cost; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_docs_quote_the_printed_table() -> None:
    script = ROOT / "benchmarks" / "flops" / "olmoe_1b_7b.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.count("|") > 20
    assert done.stdout in (ROOT / "docs" / "flops.md").read_text(encoding="utf-8")
