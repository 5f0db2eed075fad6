"""The projections of each layer's attention, by the rules of the families, from a config.json.

Only they can carry LoRA beside the experts, so that an adapter's size is exact. Layers that mix tokens by
another means, Mamba's state space or a convolution, carry none: fused kernels take their matrices past a
module, and PEFT refuses them for this reason. Small matrices beside attention, such as gates and indexers,
carry none either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LARGEST = 2**31 - 1
"""A larger size than any model has; it bounds what a config.json can make us do."""
LATENT_KEYS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
ATTENTION_SIZES = (
    "head_dim num_key_value_heads q_lora_rank kv_lora_rank swa_num_attention_heads swa_num_key_value_heads "
    "swa_head_dim global_head_dim num_global_key_value_heads num_kv_shared_layers full_attention_interval "
    "layer_group_size attn_layer_period attn_layer_offset linear_num_heads linear_head_dim "
    "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim v_head_dim"
).split()
ATTENTION_LISTS = ("layer_types", "layers_block_type")
HEADS_OF_LAYERS = "num_attention_heads_per_layer"
DELTA_NET_KEYS = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
DELTA_NET = ("qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text", "lara_mini")
_GATED_QUERIES = ("qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text")
_DELTA_ATTENTION = ("kimi_linear", "bailing_hybrid")
_NO_MIXER = ("moe", "mlp")
_LINEAR = ("linear_attention", "mamba", "conv")


@dataclass(frozen=True)
class Projection:
    """One matrix [fan_out, fan_in]. `path` has the letters of q, k and v that pass through it.

    `name` is that of its module, as PEFT's target_modules have it; empty if it cannot carry LoRA.
    """

    name: str
    fan_in: int
    fan_out: int
    path: str


Projections = tuple[Projection, ...]


@dataclass(frozen=True)
class Heads:
    """The numbers and widths of an attention's heads."""

    queries: int
    keys: int
    width: int
    """Of queries and keys."""
    values: int
    """Width of values."""


def full_attention(config: dict[str, Any]) -> tuple[Projections, int, int]:
    """Return the projections of softmax attention, the head width of queries and keys, and that of values."""
    if config.get("kv_lora_rank"):
        plain, rotary, values = (config[key] for key in LATENT_KEYS)
        return _latent(config), plain + rotary, values
    heads = _heads(config, "full_attention", 0)
    return _of_heads(config, heads), heads.width, heads.values


def attention_of_layers(config: dict[str, Any]) -> tuple[Projections, ...]:
    """Return the projections of each layer in forward order, the output projection last.

    A layer that mixes tokens without attention counts as attention, with projections that have no name. A
    layer that mixes none has no projections.
    """
    full, _, _ = full_attention(config)
    return tuple(
        _of_layer(config, _kind(config, layer), layer, full) for layer in range(config["num_hidden_layers"])
    )


def _of_layer(config: dict[str, Any], kind: str, layer: int, full: Projections) -> Projections:
    if kind in _NO_MIXER:
        return ()
    if kind in _LINEAR:
        rule = _LINEAR_RULES.get(str(config.get("model_type")))
        return rule(config) if rule else tuple(Projection("", p.fan_in, p.fan_out, p.path) for p in full)
    if config.get("kv_lora_rank"):
        return full
    return _of_heads(config, _heads(config, kind, layer), _shares_keys(config, kind, layer))


def _kind(config: dict[str, Any], layer: int) -> str:
    """Return what mixes the tokens of this layer, in transformers' words, from a list or by a rule."""
    listed = config.get("layer_types") or config.get("layers_block_type")
    if listed:
        return str(listed[layer]) if layer < len(listed) else "full_attention"
    family = config.get("model_type")
    if family in DELTA_NET[:3]:
        softmax = (layer + 1) % (config.get("full_attention_interval") or 4) == 0
    elif family == "bailing_hybrid":
        softmax = (layer + 1) % (config.get("layer_group_size") or 8) == 0
    elif family == "jamba":
        softmax = layer % (config.get("attn_layer_period") or 8) == config.get("attn_layer_offset", 4)
    elif family == "kimi_linear":
        delta = _below(config, "linear_attn_config").get("kda_layers")
        softmax = layer + 1 not in delta if isinstance(delta, list) else layer > 0 and layer % 4 == 0
    elif family == "minimax":
        softmax = layer % 2 == 0
    else:
        softmax = True
    return "full_attention" if softmax else "linear_attention"


def _heads(config: dict[str, Any], kind: str, layer: int) -> Heads:
    """Return the heads of softmax attention in this layer; in some families they differ between kinds."""
    family = config.get("model_type")
    queries = config["num_attention_heads"]
    keys = config.get("num_key_value_heads") or queries
    width = _width(config)
    if family == "mimo_v2_flash":
        return Heads(
            queries, keys * 2 if "sliding" in kind else keys, width, config.get("v_head_dim") or width
        )
    if family in ("inkling_text", "inkling2_text") and "sliding" in kind:
        queries, keys, width = (
            config.get(f"swa_{key}") or value
            for key, value in (
                ("num_attention_heads", queries),
                ("num_key_value_heads", keys),
                ("head_dim", width),
            )
        )
    if family == "gemma4_text" and kind == "full_attention":
        of_layer = _below(_below(config, "per_layer_config"), str(layer))
        width = _size(of_layer, "head_dim") or config.get("global_head_dim") or width
        shared = config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")
        keys = _size(of_layer, "num_key_value_heads") or shared or keys
    if family == "laguna":
        queries = (config.get(HEADS_OF_LAYERS) or {layer: queries})[layer]
    return Heads(queries, keys, width, width)


def _width(config: dict[str, Any]) -> int:
    width: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return width


def _below(config: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the object of this name; an empty one where there is none."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _size(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and 0 < value <= LARGEST else None


def _shares_keys(config: dict[str, Any], kind: str, layer: int) -> str:
    """Return the letters of k and v that this layer has no matrix for: another's, or its keys, are used."""
    if config.get("model_type") != "gemma4_text":
        return ""
    if layer >= config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0):
        return "kv"
    return "v" if config.get("attention_k_eq_v") and kind == "full_attention" else ""


def _of_heads(config: dict[str, Any], heads: Heads, lacking: str = "") -> Projections:
    hidden, family = config["hidden_size"], config.get("model_type")
    queries = heads.queries * heads.width * (2 if family in _GATED_QUERIES else 1)
    sizes = {
        "q": (hidden, queries, "q"),
        "k": (hidden, heads.keys * heads.width, "k" + "v" * (lacking == "v")),
        "v": (hidden, heads.keys * heads.values, "v"),
        "o": (heads.queries * heads.values, hidden, "qkv"),
    }
    name = {"inkling2_text": "{}_proj.linear"}.get(str(family), "{}_proj")
    renamed = {"o": "self_attn.out_proj"} if family == "lfm2_moe" else {}
    return tuple(
        Projection(renamed.get(letter, name.format(letter)), *size)
        for letter, size in sizes.items()
        if letter not in lacking
    )


def _latent(config: dict[str, Any]) -> Projections:
    """Return the projections of DeepSeek's multi-head latent attention, most of them low-rank."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    plain, rotary, values = (config[key] for key in LATENT_KEYS)
    q_rank, kv_rank = config.get("q_lora_rank"), config["kv_lora_rank"]
    queries = heads * (plain + rotary)
    query = [Projection("q_proj", hidden, queries, "q")]
    if q_rank:
        wide = Projection("q_b_proj", q_rank, queries, "q")
        if config.get("model_type") == "axk2":
            wide = Projection("q_gate_proj", 2 * q_rank, queries + heads * values, "q")
        query = [Projection("q_a_proj", hidden, q_rank, "q"), wide]
    return (
        *query,
        Projection("kv_a_proj_with_mqa", hidden, kv_rank + rotary, "kv"),
        Projection("kv_b_proj", kv_rank, heads * (plain + values), "kv"),
        Projection("o_proj", heads * values, hidden, "qkv"),
    )


def _delta_net(config: dict[str, Any]) -> Projections:
    """Return the projections of a gated delta net."""
    hidden = config["hidden_size"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    inner = [
        Projection("in_proj_qkv", hidden, 2 * keys + values, "qkv"),
        Projection("in_proj_z", hidden, values, "qkv"),
    ]
    if config.get("model_type") == "qwen3_next":
        inner = [Projection("in_proj_qkvz", hidden, 2 * (keys + values), "qkv")]
    return *inner, Projection("out_proj", values, hidden, "qkv")


def _delta_attention(config: dict[str, Any]) -> Projections:
    """Return the projections of Kimi's delta attention."""
    hidden, given = config["hidden_size"], _below(config, "linear_attn_config")
    heads: int = _size(given, "num_heads") or config.get("linear_num_heads") or config["num_attention_heads"]
    width: int = _size(given, "head_dim") or config.get("linear_head_dim") or _width(config)
    inner = [Projection(f"{letter}_proj", hidden, heads * width, letter) for letter in "qkv"]
    return *inner, Projection("o_proj", heads * width, hidden, "qkv")


def _lightning(config: dict[str, Any]) -> Projections:
    """Return the projections of lightning attention."""
    hidden, width = config["hidden_size"], config["num_attention_heads"] * _width(config)
    return (
        Projection("qkv_proj", hidden, 3 * width, "qkv"),
        Projection("out_proj", width, hidden, "qkv"),
    )


_LINEAR_RULES: dict[str, Callable[[dict[str, Any]], Projections]] = {
    **dict.fromkeys(DELTA_NET, _delta_net),
    **dict.fromkeys(_DELTA_ATTENTION, _delta_attention),
    "minimax": _lightning,
}
