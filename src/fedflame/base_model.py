"""Load the frozen base: the embedded model, a folder, or a hub id, in the dtype that suits the CPU."""

from __future__ import annotations

import functools
import hashlib
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from fedflame.choices import Dtype
from fedflame.config import EMBEDDED_MODEL
from fedflame.errors import UserError
from fedflame.mapped_base import map_base
from fedflame.model_shape import ModelShape, read_model_shape

PROBE_ROWS, PROBE_RANK, PROBE_REPEATS = 64, 8, 15
_LOADING = threading.Lock()
"""transformers replaces methods of its classes and torch's default dtype while it loads a model: of two
threads at once, the one that ends last would leave them replaced, and tied weights untied ever after."""
NARROW = 256
HUB_TIMEOUT_SECONDS = 10.0
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
"""Each is taken only where it is clearly faster than all before it: float16 needs loss scaling."""
CLEAR_GAIN = 1.5
"""So many times faster: native support of a half precision gives 2 to 3 on large experts, so that
noise on a busy machine does not change the answer, nor the bytes of a run."""
EMULATED = 4.0
"""Where even `NARROW` products are so many times slower than in float32 the CPU emulates the dtype;
at full size that is a hundred times, too slow to time."""


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype of the frozen base, under its name in the configuration, and why this one."""

    name: Dtype
    reason: str


def resolve_model(name_or_path: str) -> str:
    """The folder of the embedded model for its name; every other name is returned as it is."""
    if name_or_path == EMBEDDED_MODEL:
        return str(files("fedflame") / "assets" / EMBEDDED_MODEL)
    return name_or_path


def model_config_path(name_or_path: str) -> Path:
    """The model's config.json, or a folder with it, without its weights.

    Raises:
        UserError: a hub id that cannot be reached.
    """
    source = resolve_model(name_or_path)
    if Path(source).exists() or source.endswith(".json"):
        return Path(source)
    try:
        return Path(str(cached_file(source, "config.json", local_files_only=not _hub_answers(source))))
    except (OSError, ValueError) as error:
        raise UserError(_load_error(name_or_path, error)) from error


def model_digest(name_or_path: str) -> str:
    """BLAKE2b of all that decides what a model computes: weights, configuration and tokenizer, in hex.

    Raises:
        UserError: a hub id that cannot be reached, or a file that cannot be read.
    """
    source = resolve_model(name_or_path)
    folder = Path(source) if Path(source).is_dir() else Path(_downloaded(source))
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def load_base_model(
    name_or_path: str, dtype: str, memory_map: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in evaluation mode and tokenizer.

    Args:
        name_or_path: `olmoe-tiny`, a folder in Hugging Face layout, or a hub id.
        dtype: one of `DTYPES`.
        memory_map: map the weights from files instead of holding them; see `mapped_base`.

    Raises:
        UserError: the model is dense, the folder is missing or incomplete, or the hub cannot be reached.
    """
    source = resolve_model(name_or_path)
    read_model_shape(model_config_path(name_or_path))  # refuses what is no mixture of experts at once
    try:
        _require_folder_complete(source)
        with _LOADING:
            model, loading = _from_pretrained(source, getattr(torch, dtype), memory_map)
        tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=_is_local(source))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(_load_error(name_or_path, error)) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise UserError(
            f"model {name_or_path}: {len(missing)} weights are missing, the first is {missing[0]}"
        )
    return model.eval(), tokenizer


def choose_dtype(wanted: Dtype | Literal["auto"], shape: ModelShape) -> DtypeChoice:
    """The wanted dtype; for `auto` that in which this machine trains experts of this shape fastest.

    AVX-512 BF16 and AMX make large products two to three times faster; the thin ones of a small model
    run slower, so narrow experts stay in float32 unasked. Others are timed: one expert's products,
    forward and backward.
    """
    if wanted != "auto":
        return DtypeChoice(wanted, "as model.dtype asks")
    if min(shape.hidden_size, shape.expert_size) < NARROW:
        return DtypeChoice("float32", f"experts below {NARROW} gain nothing from another dtype")
    narrow = _probe(DTYPES, NARROW, NARROW)
    native = [dtype for dtype in DTYPES if narrow[dtype] <= EMULATED * narrow["float32"]]
    seconds = _probe(native, shape.hidden_size, shape.expert_size)
    found = [f"{seconds[dtype] * 1e3:.1f} ms in {dtype}" for dtype in native]
    found += [f"emulated in {dtype}" for dtype in DTYPES if dtype not in native]
    return DtypeChoice(_clearly_fastest(seconds), f"one expert's products: {', '.join(found)}")


def _clearly_fastest(seconds: dict[Dtype, float]) -> Dtype:
    """The last one that is clearly faster than all before it; the first if there is none."""
    names = list(seconds)
    return next(
        name
        for number, name in reversed(list(enumerate(names)))
        if all(seconds[before] >= CLEAR_GAIN * seconds[name] for before in names[:number])
    )


def _probe(dtypes: Sequence[Dtype], hidden_size: int, expert_size: int) -> dict[Dtype, float]:
    """Seconds of one expert's products in each dtype."""
    seconds = dict.fromkeys(dtypes, math.inf)
    for _ in range(PROBE_REPEATS):
        for name in dtypes:
            start = time.perf_counter()
            _expert_products(hidden_size, expert_size, getattr(torch, name))
            # The least of several, since another program can only add time.
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _expert_products(hidden_size: int, expert_size: int, dtype: torch.dtype) -> None:
    """The gate and up products of one expert with LoRA, and their gradients."""
    rows = torch.ones(PROBE_ROWS, hidden_size, dtype=dtype, requires_grad=True)
    base = torch.ones(2 * expert_size, hidden_size, dtype=dtype)
    low = torch.ones(PROBE_RANK, hidden_size, dtype=dtype, requires_grad=True)
    high = torch.ones(2 * expert_size, PROBE_RANK, dtype=dtype, requires_grad=True)
    output = rows @ base.T + (rows @ low.T) @ high.T
    output.backward(torch.ones_like(output))


@functools.cache
def _hub_answers(name: str) -> bool:
    """Whether the hub has this id; transformers alone would retry for a minute before it took the cache."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:  # the HTTP library, and so its errors, differ between versions
        return False
    return True


def _is_local(source: str) -> bool:
    return Path(source).is_dir() or not _hub_answers(source)


def _from_pretrained(
    source: str, dtype: torch.dtype, memory_map: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    if memory_map:
        folder = source if Path(source).is_dir() else _downloaded(source)
        return map_base(Path(folder), dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, local_files_only=_is_local(source)
    )
    return loaded[0], loaded[1]


def _downloaded(name: str) -> str:
    """The folder of a hub id on this machine, downloaded if need be."""
    patterns = ["*.json", "*.safetensors"]
    return huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=_is_local(name))


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError where it is broken."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"model {folder}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _require_folder_complete(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model {source}: the folder has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {source}: the folder has no .safetensors weights")
    if not has_tokenizer(folder):
        raise UserError(f"model {source}: the folder has no tokenizer (tokenizer.json)")


def _load_error(name_or_path: str, error: Exception) -> str:
    if Path(name_or_path).is_dir():
        return f"model {name_or_path}: cannot be loaded: {_first_line(error)}"
    return (
        f"model {name_or_path!r}: no such folder, and not loadable from the hub (offline, or no such id); "
        f"use {EMBEDDED_MODEL!r}, a folder, or a hub id"
    )
