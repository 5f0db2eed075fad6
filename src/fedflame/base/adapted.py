"""Load the frozen base with an adapter attached, in every process that trains or evaluates."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from fedflame.base.files import model_config_path
from fedflame.base.loading import load_base_model
from fedflame.base.memory_limit import is_short_of_memory
from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Checkpointed, Dtype
from fedflame.cost.memory import base_bytes
from fedflame.cost.model_shape import attention_targets, read_model_shape
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.read_ahead import read_ahead


def load_adapted_model(
    name_or_path: str,
    dtype: Dtype,
    adapter: AdapterConfig,
    gradient_checkpointing: Checkpointed = "none",
    device: str = "cpu",
) -> tuple[AdaptedModel, PreTrainedTokenizerBase]:
    """Load the base model, attach an adapter to it, and load its tokenizer.

    If a CPU is short of memory, the base is mapped from files instead of loaded into memory.

    Args:
        name_or_path: `olmoe-tiny`, a folder in Hugging Face layout, or a hub id.
        dtype: dtype of the base's weights.
        adapter: rank, scale and attention projections of the adapter.
        gradient_checkpointing: what the backward recomputes.
        device: the device that the base is loaded onto.

    Raises:
        UserError: see `load_base_model` and `AdaptedModel`.
    """
    shape = read_model_shape(model_config_path(name_or_path))
    targets = attention_targets(shape, adapter.target_modules)
    mapped = device == "cpu" and is_short_of_memory(base_bytes(shape, dtype))
    model, tokenizer = load_base_model(name_or_path, dtype, device, mapped)
    adapted = AdaptedModel(
        model,
        adapter.r,
        adapter.lora_alpha,
        targets,
        gradient_checkpointing,
        mapped,
        use_rslora=adapter.use_rslora,
    )
    if mapped:
        read_ahead(adapted.layers)
    return adapted, tokenizer
