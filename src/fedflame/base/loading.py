"""Load the frozen base onto its device, and its tokenizer: the embedded model, a folder, or a hub id."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fedflame.base.device import ALL_CARDS
from fedflame.base.files import (
    downloaded,
    is_local,
    load_error,
    model_config_path,
    require_folder_complete,
    resolve_model,
    tokenizer_error,
)
from fedflame.base.mapped import map_base
from fedflame.base.out_of_memory import memory_in_words
from fedflame.cost.model_shape import read_model_shape
from fedflame.errors import UserError

_LOADING = threading.Lock()
"""Held while a model is loaded. transformers replaces methods of its classes and torch's default dtype
meanwhile; if two threads did this at once, they would stay replaced, and tied weights would stay untied."""


def load_base_model(
    name_or_path: str, dtype: str, device: str = "cpu", memory_map: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model, in evaluation mode, and its tokenizer.

    Args:
        name_or_path: `olmoe-tiny`, a folder in Hugging Face layout, or a hub id.
        dtype: one of `DTYPES`.
        device: the device that the weights are loaded onto, such as cpu or cuda:0, or `ALL_CARDS`.
        memory_map: map the weights from files instead of loading them into memory; see `base.mapped`. Only on
            a CPU.

    Raises:
        UserError: the model is dense, the folder is missing or incomplete, or the hub cannot be reached.
        OutOfMemory: the device's memory is full.
    """
    source = resolve_model(name_or_path)
    read_model_shape(model_config_path(name_or_path))  # refuses a dense model at once
    try:
        require_folder_complete(source)
        with _LOADING, memory_in_words(device, f"loading {name_or_path} in {dtype}", ""):
            model, loading = _from_pretrained(source, getattr(torch, dtype), device, memory_map)
    except UserError:
        raise
    except Exception as error:  # of transformers, tokenizers or safetensors, whatever is in their files
        raise UserError(load_error(name_or_path, error)) from error
    tokenizer = _tokenizer(name_or_path, source)
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model {name_or_path}: {len(missing)} weights are missing, the first is {missing[0]}"
        )
    _fit_padding(tokenizer, model)
    return model.eval(), tokenizer


def _tokenizer(name_or_path: str, source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            source, local_files_only=is_local(source), trust_remote_code=False
        )
    except Exception as error:  # of transformers or tokenizers, whatever is in their files
        folder = Path(source) if Path(source).is_dir() else Path(downloaded(source))
        raise UserError(tokenizer_error(name_or_path, folder, error)) from error


def _fit_padding(tokenizer: Any, model: Any) -> None:
    """Pad with the end token where the padding token is one that the model has no embedding for."""
    known = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token


def _from_pretrained(
    source: str, dtype: torch.dtype, device: str, memory_map: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    if memory_map:
        folder = source if Path(source).is_dir() else downloaded(source)
        return map_base(Path(folder), dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        **_placement(device),
        output_loading_info=True,
        local_files_only=is_local(source),
        trust_remote_code=False,
        use_safetensors=True,
    )
    return loaded[0], loaded[1]


def _placement(device: str) -> dict[str, Any]:
    """Return what tells transformers where the weights go; of all cards none may leave any to the CPU."""
    if device != ALL_CARDS:
        return {"device_map": {"": device}}
    free = {card: torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count())}
    return {"device_map": ALL_CARDS, "max_memory": free}
