"""Read the sizes that decide the cost of a sparse-mixture-of-experts model from its config.json.

Neither torch nor transformers is imported, so that `fedflame plan` answers at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflame.config.sections import AUTO
from fedflame.cost.attention import (
    ATTENTION_LISTS,
    ATTENTION_SIZES,
    DELTA_NET,
    DELTA_NET_KEYS,
    HEADS_OF_LAYERS,
    LARGEST,
    LATENT_KEYS,
    Projections,
    attention_of_layers,
    full_attention,
)
from fedflame.cost.refused_families import refusal
from fedflame.errors import UserError
from fedflame.reading import read_object, shown

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
_SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_REQUIRED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_UNGATED = ("nemotron_h",)
_OPTIONAL_SIZES = (
    "moe_intermediate_size intermediate_size shared_expert_intermediate_size moe_latent_size "
    "decoder_sparse_step moe_layer_interval first_k_dense_replace num_dense_layers moe_layer_start_index "
    "expert_layer_period expert_layer_offset"
).split()
_LISTS = ("mlp_layer_types", "mlp_only_layers")
_MOST_LAYERS = 10_000
"""More layers than any model has."""
_PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
"""The letters of Nemotron's hybrid_override_pattern."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, in values. All layers have the same experts."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    qk_head_dim: int
    v_head_dim: int
    attention: tuple[Projections, ...]
    """For each layer its projections, in forward order, the output projection last."""
    attention_vectors: int
    """Number of norm weights and biases in one attention."""
    sparse_layers: tuple[bool, ...]
    """For each layer: experts (True) or a dense MLP (False)."""
    num_experts: int
    num_experts_per_tok: int
    expert_size: int
    """Inner width of one expert (I)."""
    expert_hidden_size: int
    """Width of the experts' input and output; below hidden_size where projections surround the experts."""
    expert_matrices: int
    """Matrices of one expert: gate, up and down, or up and down."""
    shared_size: int
    """Inner width of all shared experts of a layer together; 0 if there are none."""
    shared_gate: bool
    """Whether a [1,H] gate scales the shared expert (qwen2_moe)."""
    dense_size: int
    """Inner width of a dense layer's MLP; 0 if no layer is dense."""
    tie_word_embeddings: bool
    max_position_embeddings: int | None = None
    """The tokens of the model's context; None if its config.json does not say."""

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts (L)."""
        return sum(self.sparse_layers)


def read_model_shape(path: Path) -> ModelShape:
    """Read the shape of a model from a folder in Hugging Face layout or from a config.json file.

    Raises:
        UserError: there is no such file, it is not JSON, the model is dense or of a refused family, or a key
            is missing or wrong.
    """
    whole = _read_config(path)
    config = _of_the_text(whole)
    _require_types(path, config)
    for family in (whole.get("model_type") or "", config.get("model_type") or ""):
        if refused := refusal(family):
            raise UserError(f"model {path}: {refused}")
    if not any(config.get(key) for key in _EXPERT_KEYS):
        raise UserError(
            f"model {path}: {config.get('model_type', 'config.json')} is no sparse mixture of experts: "
            f"it has no {', '.join(_EXPERT_KEYS[:-1])} or {_EXPERT_KEYS[-1]}"
        )
    _check_sizes(path, config)
    sparse = _sparse_layers(config)
    if not any(sparse):
        raise UserError(
            f"model {path}: no sparse mixture of experts: by its config.json all layers are dense"
        )
    if not all(sparse):
        _require(path, config, ("intermediate_size",))
    expert_size = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared_size = config.get("shared_expert_intermediate_size")
    projections, qk_head_dim, v_head_dim = full_attention(config)
    return ModelShape(
        model_type=str(config.get("model_type", "")),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        qk_head_dim=qk_head_dim,
        v_head_dim=v_head_dim,
        attention=attention_of_layers(config),
        attention_vectors=_attention_vectors(config, projections, qk_head_dim),
        sparse_layers=sparse,
        num_experts=config[_key(config, _EXPERT_KEYS)],
        num_experts_per_tok=config[_key(config, _TOP_K_KEYS)],
        expert_size=expert_size,
        expert_hidden_size=config.get("moe_latent_size") or config["hidden_size"],
        expert_matrices=2 if config.get("model_type") in _UNGATED else 3,
        shared_size=shared_size or (config.get(_key(config, _SHARED_KEYS)) or 0) * expert_size,
        shared_gate=bool(shared_size),
        dense_size=0 if all(sparse) else config["intermediate_size"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings") or None,
    )


def base_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of the frozen base model.

    It is exact for olmoe, mixtral, qwen2_moe, qwen3_moe and deepseek_v3. For other families it is an
    estimate: the token mixer of each layer counts as attention, and parts that only that family has (norms,
    biases, projections around the experts, an MLP beside them) are left out. The number for the experts is
    exact in all families.
    """
    h = shape.hidden_size
    attention = sum(p.fan_in * p.fan_out for layer in shape.attention for p in layer)
    vectors = sum(map(bool, shape.attention)) * shape.attention_vectors
    shared = 3 * h * shape.shared_size + h * shape.shared_gate
    expert = shape.expert_matrices * shape.expert_hidden_size * shape.expert_size
    sparse = shape.num_experts * (expert + h) + shared
    dense = 3 * h * shape.dense_size
    layers = len(shape.sparse_layers)
    embeddings = shape.vocab_size * h * (1 if shape.tie_word_embeddings else 2)
    blocks = shape.moe_layers * sparse + (layers - shape.moe_layers) * dense
    return attention + vectors + layers * 2 * h + blocks + h + embeddings


def attention_targets(shape: ModelShape, target_modules: Collection[str]) -> tuple[str, ...]:
    """Return the names of the attention projections that carry LoRA.

    Args:
        shape: the sizes of the model.
        target_modules: some of its attention projections, or `AUTO` alone for all of them.

    Raises:
        UserError: a name is no attention projection of the model.
    """
    names = tuple(dict.fromkeys(p.name for layer in shape.attention for p in layer if p.name))
    if tuple(target_modules) == AUTO:
        return names
    for module in target_modules:
        if module not in names:
            raise UserError(
                f"adapter.target_modules {shown(module)}: must be 'auto', or attention projections of "
                f"{shape.model_type}: {', '.join(names)}. The experts always carry LoRA; router, embeddings "
                "and head never do"
            )
    return tuple(target_modules)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"model {path}: no such file or folder")
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"model {path}: the folder has no config.json")
    return read_object(
        file, "model ", bare_words=True
    )  # transformers writes them: "time_step_limit": [0, Infinity]


def _of_the_text(whole: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the language model; a model that sees images has them one level down."""
    text = whole.get("text_config")
    config = whole | text if isinstance(text, dict) else dict(whole)
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str) and set(pattern) <= _PATTERN.keys():
        config.setdefault("layers_block_type", [_PATTERN[letter] for letter in pattern[: _MOST_LAYERS + 1]])
    if isinstance(config.get("layers_block_type"), list):
        config["num_hidden_layers"] = len(config["layers_block_type"])
    return config


def _require(path: Path, config: dict[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if config.get(key) is None]
    if missing:
        raise UserError(f"model {path}: config.json lacks {', '.join(missing)}")
    for key in keys:
        most = _MOST_LAYERS if key == "num_hidden_layers" else LARGEST
        if type(config[key]) is not int or not 1 <= config[key] <= most:
            raise UserError(
                f"model {path}: config.json: {key} = {shown(config[key])}: must be a positive integer, "
                f"at most {most:,}"
            )


def _require_types(path: Path, config: dict[str, Any]) -> None:
    """Refuse what a key that may be missing cannot be."""
    sizes: dict[str, object] = dict.fromkeys((*_OPTIONAL_SIZES, *ATTENTION_SIZES, *_SHARED_KEYS), 0)
    wanted = sizes | {key: [] for key in (*_LISTS, *ATTENTION_LISTS)} | {"model_type": ""}
    for key, example in wanted.items():
        value = config.get(key)
        fits = value is None or isinstance(value, type(example))
        if not fits or (isinstance(value, int) and not 0 <= value <= LARGEST):
            raise UserError(f"model {path}: config.json: {key} = {shown(value)}: must be {_kind(example)}")
        if isinstance(value, list) and (len(value) > _MOST_LAYERS or not all(map(_is_layer, value))):
            raise UserError(f"model {path}: config.json: {key}: must be {_kind(example)}")


def _kind(example: object) -> str:
    kinds = {int: f"an integer from 0 to {LARGEST:,}", str: "a name"}
    return kinds.get(type(example), f"a list of at most {_MOST_LAYERS:,} names or numbers")


def _is_layer(value: object) -> bool:
    return isinstance(value, int | str)


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    width = "intermediate_size" if config.get("moe_intermediate_size") is None else "moe_intermediate_size"
    counts = (_key(config, _EXPERT_KEYS), _key(config, _TOP_K_KEYS))
    latent = LATENT_KEYS if config.get("kv_lora_rank") else ()
    linear = DELTA_NET_KEYS if config.get("model_type") in DELTA_NET else ()
    _require(path, config, (*_REQUIRED_KEYS, *counts, width, *latent, *linear))
    heads = config.get(HEADS_OF_LAYERS)
    if heads is not None and not _are_sizes(heads, config["num_hidden_layers"]):
        raise UserError(f"model {path}: config.json: {HEADS_OF_LAYERS}: must be a number for each layer")


def _are_sizes(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(type(value) is int and 0 < value <= LARGEST for value in values)
    )


def _key(config: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first of the names that this config has a value for; the first name if there is none."""
    return next((name for name in names if config.get(name)), names[0])


def _sparse_layers(config: dict[str, Any]) -> tuple[bool, ...]:
    """Return which layers are sparse, from a list of layer types or by the rules of the families."""
    if "moe" in (config.get("layers_block_type") or []):
        return tuple(kind == "moe" for kind in config["layers_block_type"])
    if config.get("mlp_layer_types"):
        return tuple(kind != "dense" for kind in config["mlp_layer_types"])
    step = config.get(_key(config, ("decoder_sparse_step", "moe_layer_interval"))) or 1
    only = config.get("mlp_only_layers") or []
    first = (
        config.get(_key(config, ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"))) or 0
    )
    period, offset = config.get("expert_layer_period") or 1, config.get("expert_layer_offset") or 0
    layers = range(config["num_hidden_layers"])
    return tuple(
        i >= first and i not in only and (i + 1) % step == 0 and i % period == offset for i in layers
    )


def _attention_vectors(config: dict[str, Any], projections: Projections, head_dim: int) -> int:
    family = config.get("model_type")
    outputs = [p.fan_out for p in projections]
    if config.get("kv_lora_rank"):
        return (config.get("q_lora_rank") or 0) + int(config["kv_lora_rank"])
    norms = {"olmoe": sum(outputs[:2]), "qwen3_moe": 2 * head_dim}.get(str(family), 0)
    if config.get("qkv_bias", family == "qwen2_moe"):
        return norms + sum(outputs[:3])
    return norms + (sum(outputs) if config.get("attention_bias") else 0)
