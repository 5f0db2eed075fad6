"""Tiny random models of every SMoE family of transformers, and the table in docs/families.md.

    python -m tests.families

writes the table; a test keeps it true.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import _default_apply_gate
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedflame.cost.attention import attention_of_layers
from fedflame.cost.refused_families import BALANCED, NOT_PACKABLE, REFUSED_FAMILIES
from fedflame.moe.families import MoELayer, find_moe_layers

EXPERTS, TOP_K, HIDDEN, WIDTH, VOCABULARY = 6, 3, 24, 20, 94

TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configs call K; each family has one of them."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "intermediate_size": 36,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 28,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "first_k_dense_replace": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
}
"""The config of a family takes those of them that it has a name for."""

MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
INDEXED: dict[str, Any] = {
    **MLA,
    "index_topk": 64,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "layer_types": ["indexed_attention", "indexed_attention"],
}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR_MLA: dict[str, Any] = {**MLA, **HYBRID, "linear_head_dim": 8, "linear_num_heads": 4}
DELTA_NET: dict[str, Any] = {
    **HYBRID,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": MLA,
    "axk2": INDEXED,
    "bailing_hybrid": LINEAR_MLA,
    "beam": {"final_logit_softcapping": 2.0},
    "cohere2_moe": {"logit_scale": 0.25},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": INDEXED,
    "dots1": {},
    "dots3_note_text": INDEXED,
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "final_logit_softcapping": 2.0,
    },
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": {**INDEXED, "indexer_types": ["full", "shared"]},
    "gpt_oss": {"initializer_range": 0.4, "swiglu_limit": 0.5},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoe_swa": {"logits_scaling": 3.0},
    "granitemoehybrid": {
        **HYBRID,
        "logits_scaling": 3.0,
        "mamba_n_heads": 4,
        "mamba_d_head": 12,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "granitemoeshared": {"logits_scaling": 3.0},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {**INDEXED, "swiglu_limit": 0.5},
    "inkling2_text": {"vocab_size": VOCABULARY + 2, "unpadded_vocab_size": VOCABULARY},
    "inkling_text": {"logits_mup_width_multiplier": 3.0},
    "jamba": {
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": LINEAR_MLA,
    "kolibri1": {},
    "laguna": {},
    "lara_mini": {**DELTA_NET, "layer_types": ["linear_attention", "sliding_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {"swiglu_limit": 0.5},
    "mixtral": {},
    "nemotron_h": {
        "layers_block_type": ["full_attention", "moe", "linear_attention", "moe"],
        "num_hidden_layers": 4,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 28,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": DELTA_NET,
    "qwen3_moe": {},
    "qwen3_next": DELTA_NET,
    "qwen4_exp_text": {
        **DELTA_NET,
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "solar_open": {},
}
"""Every family that is supported, and what its tiny config needs beside `SIZES`."""


def tiny(family: str, k: int = TOP_K, **overrides: Any) -> PreTrainedModel:
    """A random frozen model with two MoE layers, built with this top-k; the same for the same arguments."""
    config_class = CONFIG_MAPPING[family]
    known = config_class().to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known} | FAMILIES.get(family, {})
    sizes |= {key: k for key in TOP_K_KEYS if key in known}
    config = config_class(**sizes | overrides, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if not parameter.any():  # biases, mostly; what is zero would hide that it is ignored
                nn.init.normal_(parameter, std=0.2)
    # Some kernels (Jamba's) take another path for weights that require a gradient, with other last bits.
    return model.requires_grad_(False)


PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def page() -> str:
    """The text of docs/families.md."""
    supported = "\n".join(_supported_row(family) for family in FAMILIES)
    alone = "\n".join(f"| {family} | {reason} |" for family, reason in NOT_PACKABLE.items())
    refused = "\n".join(f"| {family} | {reason} |" for family, reason in REFUSED_FAMILIES.items())
    return f"""# Model families

This page is made by `python -m tests.families`, and a test keeps it true. A family is named by the
`model_type` of its `config.json`. fedflame trains every causal language model whose experts transformers 5
routes through its experts interface. `tests/moe/test_every_family.py` holds a tiny random model of each
family against transformers: outputs at the model's own K and at smaller k, loss, gradients, training, counts,
and a merged checkpoint.

Every family can be exported as a merged checkpoint. A PEFT adapter ([formats](formats.md)) can be exported of
all but those with transposed weights, interleaved gate and up, or no gate.

`fedflame plan` counts the experts and the adapter of every family exactly. For families that the page on
[FLOPs](flops.md) does not name, the rest is an estimate: every token mixer is counted as attention.

## Supported: {len(FAMILIES)}

| family | tested with | handled beside gate and up rows |
| --- | --- | --- |
{supported}

## Attention that carries LoRA

With `adapter.target_modules = "auto"` these projections carry LoRA. A list of some of them can be given
instead, and nothing else: the experts always carry LoRA, and routers, shared experts, embeddings and head
never do. Where layers differ, each carries LoRA on those of the projections that it has. Layers with Mamba's
state space (granitemoehybrid, jamba, nemotron_h) or a convolution (lfm2_moe) instead of attention have it on
their experts alone: fused kernels take the matrices of such layers past any LoRA.
`tests/cost/test_attention.py` holds the sizes of every family against the model, and that all of it learns.

| families | projections |
| --- | --- |
{_projections()}

## With a load-balancing loss: {len(BALANCED)}

`training.router_aux_loss_coef` needs a load-balancing loss of the family in transformers, which these have:
{_lines(sorted(BALANCED))}.
The others balance their experts by a bias, or not at all, and are refused.
`tests/moe/test_load_balancing.py` holds the loss of each against transformers' own.

## Without packing: {len(NOT_PACKABLE)}

With `training.packing` or `training.padding_free` rows share a sequence. In these families a row would then
change another, so that both settings are refused. In all others a row has the loss that it has alone, and no
other row changes a bit of it: `tests/moe/test_packed_rows.py` holds every family to it, in both lists.

| family | why |
| --- | --- |
{alone}

## Refused: {len(REFUSED_FAMILIES)}

| family | why |
| --- | --- |
{refused}
"""


def _lines(names: list[str]) -> str:
    return textwrap.fill(", ".join(names), 110, break_on_hyphens=False)


def _projections() -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        config = tiny(family).config
        sizes = config.to_dict() | {"num_hidden_layers": config.num_hidden_layers}
        layers = attention_of_layers(sizes)
        names = dict.fromkeys(p.name for layer in layers for p in layer if p.name)
        rows.setdefault(tuple(names), []).append(family)
    commonest = max(rows.values(), key=len)
    return "\n".join(
        f"| {'all others' if families is commonest else ', '.join(families)} | {', '.join(names)} |"
        for names, families in rows.items()
    )


def _supported_row(family: str) -> str:
    model = tiny(family)
    deviations = _deviations(model, find_moe_layers(model)[0])
    return f"| {family} | {type(model).__name__} | {', '.join(deviations)} |"


def _deviations(model: PreTrainedModel, layer: MoELayer) -> list[str]:
    experts = layer.experts
    found = {
        "no gate": not experts.has_gate,
        "transposed weights": experts.is_transposed,
        "expert biases": experts.has_bias,
        "interleaved gate and up": not experts.is_concatenated,
        "its own activation": experts.has_gate and type(experts)._apply_gate is not _default_apply_gate,
        "experts in a narrower space": layer.hidden_size != model.config.hidden_size,
        "k in the config": not hasattr(layer.router, "top_k"),
        "changed logits": _changes_logits(model),
    }
    return [deviation for deviation, present in found.items() if present]


@torch.no_grad()
def _changes_logits(model: PreTrainedModel) -> bool:
    tokens = torch.arange(3, 14).unsqueeze(0)
    plain = model.get_output_embeddings()(model.get_decoder()(input_ids=tokens).last_hidden_state)
    logits = model(input_ids=tokens).logits
    return plain.shape != logits.shape or not torch.allclose(plain.float(), logits.float(), atol=1e-4)


def causal_class(family: str) -> str | None:
    """The class that `AutoModelForCausalLM` builds for this model_type."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
