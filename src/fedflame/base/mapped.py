"""Map a base model from files in the layout with which transformers computes.

A checkpoint on the hub has one tensor per expert and projection. transformers fuses them when it loads, which
copies everything into memory. Here this is done once, in groups, and the result is written to files that are
then mapped. Pages are read when an expert is used, are shared by all processes of the machine, and are given
back when memory is short. So a model may be larger than memory. Writing to a mapped weight copies the page
for this process only; the files never change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from fedflame.errors import UserError

CACHE_VARIABLE = "FEDFLAME_CACHE"
COMPLETE = "complete.json"
"""Written last. A folder without this file is incomplete."""


def map_base(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint folder with mapped weights; return the model and transformers' loading report.

    The mapped files are made at first use, in $FEDFLAME_CACHE or ~/.cache/fedflame. They take as much disk as
    the model; making them takes the memory of its largest layer.

    Args:
        folder: a folder in Hugging Face layout, with config.json and .safetensors files.
        dtype: dtype of the mapped weights.

    Raises:
        UserError: the checkpoint is quantised, the disk is full, or a file of the cache is broken.
        OSError, ValueError, KeyError, SafetensorError: the checkpoint cannot be read.
    """
    _refuse_quantised(folder)
    cache = _cache_folder(folder, dtype)
    if not (cache / COMPLETE).exists():
        _build(folder, dtype, cache)
    return load_mapped(cache, _config(folder), dtype)


def load_mapped(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a folder of mapped files; return the model and transformers' loading report.

    Args:
        folder: .safetensors files with the values of the model's `state_dict`, split in any way.
        config: the model's configuration.
        dtype: dtype of the values in the files. Another dtype would copy them into memory.

    Raises:
        UserError: a file is broken.
    """
    loaded: Any = type(_on_meta(config, dtype)).from_pretrained(
        None,
        config=config,
        state_dict=dict(_mapped(folder)),
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    return loaded[0], loaded[1]


def _refuse_quantised(folder: Path) -> None:
    """Raise UserError if weights need a quantiser: their values are not those of the parameters."""
    quantised: Any = getattr(_config(folder), "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(
            f"model {folder}: its weights are quantised ({getattr(method, 'value', method)}), and cannot be "
            "mapped, as a base is that takes over a quarter of the memory; take a checkpoint that is not "
            "quantised, or a machine with more memory"
        )


def _cache_folder(folder: Path, dtype: torch.dtype) -> Path:
    """Return the cache folder of a checkpoint. A changed checkpoint gets another folder."""
    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "fedflame")
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _checkpoint_files(folder)]
    identity = json.dumps([str(folder.resolve()), stats, str(dtype), transformers_version])
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    return root / "mapped" / f"{folder.resolve().name}-{str(dtype).removeprefix('torch.')}-{digest}"


def _checkpoint_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _build(folder: Path, dtype: torch.dtype, cache: Path) -> None:
    partial = cache.with_name(f"{cache.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        names = []
        for number, tensors in enumerate(_fused_groups(folder, dtype)):
            save_file(tensors, partial / f"{number:04}.safetensors", metadata={"format": "pt"})
            names += list(tensors)
        (partial / COMPLETE).write_text(json.dumps({"checkpoint": str(folder.resolve()), "tensors": names}))
        partial.rename(cache)
    except OSError as error:
        if (cache / COMPLETE).exists():  # another process has made the folder meanwhile
            return
        raise UserError(f"{cache}: cannot write the mapped model: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fused_groups(folder: Path, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Yield fused parameters, one layer at a time, with transformers' own conversion."""
    model = _on_meta(_config(folder), dtype)
    files: list[Any] = [safe_open(path, "pt") for path in _checkpoint_files(folder)]
    slices = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118
    for names in _by_layer(slices):
        conversions: Any = get_model_conversion_mapping(model)
        settings = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=conversions,
        )
        convert_and_load_state_dict_in_model(model, {name: slices[name] for name in names}, settings)
        yield {name: value.contiguous() for name, value in _take_loaded(model)}


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    """Group names by their first number, which is the layer; names without a number form one group."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layer = re.match(r".*?\.\d+\.", name)
        groups[layer[0] if layer else ""].append(name)
    return list(groups.values())


def _take_loaded(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers that were loaded, and put meta tensors in their place."""
    for name, value in list(model.state_dict(keep_vars=True).items()):
        if value.device.type != "meta":
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            empty = value.detach().to("meta")
            if attribute in module._parameters:
                module._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
            else:
                module._buffers[attribute] = empty
            yield name, value.detach()


def _mapped(cache: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _checkpoint_files(cache):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: broken ({error}); delete {cache}, and it is made anew") from error


def _on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    return model


def _config(folder: Path) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return config
