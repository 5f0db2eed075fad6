"""The attention projections of every family: what a config.json says against the modules of the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cost.shipped_configs import QKVO
from tests.families import FAMILIES, HIDDEN, VOCABULARY, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedflame.config.sections import AUTO
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.model_shape import attention_targets, read_model_shape
from fedflame.errors import UserError
from fedflame.moe.adapted_model import AdaptedModel

RANK = 2


def require_as_the_config_says(model: PreTrainedModel, folder: Path) -> AdaptedModel:
    """Attach LoRA of the targets `auto` to a model, and compare it with the sizes in the folder's config."""
    shape = read_model_shape(folder)
    targets = attention_targets(shape, AUTO)
    adapted = AdaptedModel(model, RANK, 4.0, targets)
    attached, said = adapted.attached(), adapter_parameters(shape, RANK, AUTO)
    assert sum(value.numel() for value in attached.experts.values()) == said.experts
    assert sum(value.numel() for value in attached.attention.values()) == said.attention
    experts = sum(bank.shape[0] for bank in attached.experts.values())
    assert experts + len(attached.attention) == said.matrices
    for target in targets:
        assert any(name.rpartition(".")[0].endswith(f".{target}") for name in attached.attention), target
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_has_the_size_that_the_config_says_and_all_of_it_learns(
    family: str, tmp_path: Path
) -> None:
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    adapted = require_as_the_config_says(model, tmp_path)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapted.attention.values():
            value.normal_(std=0.2, generator=draws)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=draws)
    model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[..., 3].sum().backward()
    inert = [name for name, value in adapted.attention.items() if value.grad is None or not value.grad.any()]
    assert inert == []


AS_ON_THE_HUB: dict[str, dict[str, Any]] = {
    "qwen3_next": {"full_attention_interval": 3},
    "qwen3_5_moe_text": {},
    "bailing_hybrid": {"layer_group_size": 2},
    "kimi_linear": {
        "linear_attn_config": {
            "full_attn_layers": [2, 5],
            "kda_layers": [1, 3, 4],
            "head_dim": 6,
            "num_heads": 3,
            "short_conv_kernel_size": 4,
        },
        "q_lora_rank": None,
        "first_k_dense_replace": 0,
    },
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "minimax": {},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "per_layer_config": None,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "MEM*E",
        "layers_block_type": None,
        "time_step_limit": None,
    },
    "laguna": {"num_attention_heads_per_layer": [4, 8, 4, 2, 4], "mlp_layer_types": ["sparse"] * 5},
}
"""Family -> what the config.json of a checkpoint has instead of what transformers makes of it."""


@pytest.mark.parametrize("family", AS_ON_THE_HUB)
def test_the_config_of_a_checkpoint_says_it_too(family: str, tmp_path: Path) -> None:
    values = json.loads(tiny(family).config.to_json_string())
    raw = {key: value for key, value in values.items() if key not in ("layer_types", "mlp_layer_types")}
    raw |= {"num_hidden_layers": 5} | AS_ON_THE_HUB[family]
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**raw))
    require_as_the_config_says(model, tmp_path)


def test_auto_is_the_four_projections_where_a_model_has_these_alone(tmp_path: Path) -> None:
    found = {}
    for family in FAMILIES:
        tiny(family).config.save_pretrained(tmp_path / family)
        found[family] = attention_targets(read_model_shape(tmp_path / family), AUTO)
    assert {family: names for family, names in found.items() if names != QKVO} == {
        **dict.fromkeys(
            [
                *"axk1 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text glm4_moe_lite".split(),
                "glm_moe_dsa",
                "hy_v4",
            ],
            ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        ),
        "axk2": ("q_a_proj", "q_gate_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        **dict.fromkeys(
            ("bailing_hybrid", "kimi_linear"),
            (*QKVO, "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        ),
        "inkling2_text": ("q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear"),
        "lfm2_moe": ("q_proj", "k_proj", "v_proj", "self_attn.out_proj"),
        "minimax": (*QKVO, "qkv_proj", "out_proj"),
        "qwen3_next": ("in_proj_qkvz", "out_proj", *QKVO),
        **dict.fromkeys(
            ("lara_mini", "qwen3_5_moe_text", "qwen4_exp_text"),
            ("in_proj_qkv", "in_proj_z", "out_proj", *QKVO),
        ),
    }


@pytest.mark.parametrize(
    "name", ["all-linear", "lm_head", "embed_tokens", "gate", "v_porj", "auto", "in_proj", "\x1b[31m"]
)
def test_another_name_is_refused_with_those_that_are_allowed(name: str, tmp_path: Path) -> None:
    tiny("qwen3_next").config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        attention_targets(read_model_shape(tmp_path), ["q_proj", name])
    shown = name.replace("\x1b", "\\x1b")
    assert (
        str(caught.value)
        == (
            f"adapter.target_modules {shown!r}: must be 'auto', or attention projections of qwen3_next: "
            "in_proj_qkvz, out_proj, q_proj, k_proj, v_proj, o_proj. The experts always carry LoRA; router, "
            "embeddings and head never do"
        )
        or name == "\x1b[31m"
    )
    assert "\x1b" not in str(caught.value)


def test_a_projection_that_carries_no_lora_has_the_size_of_attention(tmp_path: Path) -> None:
    tiny("granitemoehybrid").config.save_pretrained(tmp_path)
    mamba, attention = read_model_shape(tmp_path).attention
    assert [p.name for p in mamba] == [""] * 4
    assert [(p.fan_in, p.fan_out) for p in mamba] == [(p.fan_in, p.fan_out) for p in attention]
    assert [p.fan_in for p in attention] == [HIDDEN] * 4


def test_junk_in_a_config_is_refused_or_left_out(tmp_path: Path) -> None:
    tiny("qwen3_next").config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for key, junk, line in (
        ("layer_types", "linear_attention", "layer_types = 'linear_attention': must be a list"),
        ("linear_key_head_dim", 2**40, "linear_key_head_dim = 1099511627776: must be"),
        ("linear_num_value_heads", None, "config.json lacks linear_num_value_heads"),
        ("head_dim", -1, "head_dim = -1: must be"),
        ("num_attention_heads_per_layer", [4], "num_attention_heads_per_layer: must be a number for each"),
        ("num_attention_heads_per_layer", ["4", 4], "num_attention_heads_per_layer: must be a number"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | {key: junk}))
        with pytest.raises(UserError) as caught:
            read_model_shape(tmp_path)
        assert line in str(caught.value)
