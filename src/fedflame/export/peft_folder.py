"""A finished run as a PEFT adapter folder, and back: the only module that knows PEFT's layouts.

Expert LoRA is written per expert, in the module names of the Hugging Face hub
(`...experts.3.gate_proj.lora_A.weight`): PEFT fuses it exactly when it loads, and servers
read it. PEFT has no place for the rescaler s: it stands beside the adapter in a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fedflame.config import AdapterConfig, RunConfig
from fedflame.errors import UserError
from fedflame.export.description import adapter_card, run_facts
from fedflame.export.fit import bank_shapes, require_fit
from fedflame.export.new_folder import RUN_FILE, new_folder, write_json
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import MoELayer, find_moe_layers
from fedflame.strategies.base import ServerState

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RESCALERS_FILE = "rescalers.safetensors"

_UNSUPPORTED_LORA = (
    "use_rslora",
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)


class NoPeftLayoutError(UserError):
    """PEFT cannot read an adapter of this model family; a merged checkpoint can be written."""


@dataclass(frozen=True)
class AdapterSettings:
    """What has to be known of an adapter folder before its model can be prepared."""

    base_model: str
    adapter: AdapterConfig
    """r, lora_alpha and the attention projections in target_modules."""


def export_adapter(
    state: ServerState,
    config: RunConfig,
    model: PreTrainedModel,
    to: Path,
    rounds: int,
    overwrite: bool = False,
) -> None:
    """Write the folder that `PeftModel.from_pretrained(base, to)` loads; outputs equal ours at k = K.

    Merged factors are further ranks of the adapter, with lora_alpha / r as it was. Beside PEFT's two files:
    `rescalers.safetensors` ("k4": [L] for the tier k = 4), `fedflame.json`, and the model card README.md.

    Args:
        state: adapter, rescalers and merged factors of the run.
        config: the run's configuration.
        model: the base model, plain or adapted. Only its structure is read: the meta device will do.
        to: the folder to make.
        rounds: federated rounds that led to `state`, for the model card.
        overwrite: replace an earlier export; no other folder is ever replaced.

    Raises:
        UserError: `to` holds something, the disk is full, the model is not the run's, or PEFT cannot read
            the experts of this model family one by one.
    """
    layers = find_moe_layers(model)
    total, r = state.total, config.adapter.r + state.merged.rank
    require_fit(total, model, layers, r)
    _require_per_expert_layout(model, total)
    with new_folder(to, overwrite) as folder:
        _write_tensors(folder / WEIGHTS_FILE, _peft_tensors(total, layers, r))
        _write_tensors(folder / RESCALERS_FILE, ((f"k{k}", s) for k, s in state.rescalers.items()))
        write_json(folder / CONFIG_FILE, _peft_config(config, r))
        write_json(folder / RUN_FILE, run_facts(state, config, layers, rounds))
        card = adapter_card(state, config, layers[0].num_experts_per_tok, rounds)
        (folder / "README.md").write_text(card, encoding="utf-8")


def read_settings(path: Path) -> AdapterSettings:
    """Base model, r, lora_alpha and attention projections of an adapter folder.

    Raises:
        UserError: no adapter folder, no per-expert LoRA, or a LoRA variant other than W + (alpha/r) B A.
    """
    values = _read_json(path / CONFIG_FILE)
    targets, base = values.get("target_modules"), values.get("base_model_name_or_path")
    if values.get("peft_type") != "LORA" or not isinstance(targets, list):
        raise UserError(f"{path}: no LoRA adapter with a list of target_modules")
    if not set(EXPERT_PROJECTIONS) <= set(targets):
        raise UserError(
            f"{path}: target_modules lack {', '.join(EXPERT_PROJECTIONS)}: no LoRA on each expert"
        )
    variants = [key for key in _UNSUPPORTED_LORA if values.get(key)]
    if variants:
        raise UserError(f"{path}: LoRA with {', '.join(variants)} is not supported")
    attention = ",".join(name for name in targets if name not in EXPERT_PROJECTIONS)
    if not isinstance(base, str):
        raise UserError(f"{path}: {CONFIG_FILE} names no base model")
    try:
        adapter = AdapterConfig(r=values["r"], lora_alpha=values["lora_alpha"], target_modules=attention)
    except (KeyError, ValidationError) as error:
        got = ", ".join(f"{key} = {values.get(key)!r}" for key in ("r", "lora_alpha"))
        raise UserError(f"{path}: {got} in {CONFIG_FILE}; both must be positive numbers") from error
    return AdapterSettings(base, adapter)


def load_adapter(path: Path, adapted: AdaptedModel) -> Adapter:
    """The adapter of a folder in PEFT's per-expert layout, bit for bit, as banks for `adapted`.

    Raises:
        UserError: no adapter folder, r or scaling differ from `adapted`'s, or the tensors are not exactly
            those that its layers and attention projections need.
    """
    _require_same_scaling(path, read_settings(path).adapter, adapted)
    tensors = _read_tensors(path / WEIGHTS_FILE)
    experts = {name: torch.empty(shape) for name, shape in bank_shapes(adapted.layers, adapted.r).items()}
    attention = {name: torch.empty(parameter.shape) for name, parameter in adapted.attention.items()}
    slots = dict(_peft_tensors(Adapter(experts, attention), adapted.layers, adapted.r))
    for key in sorted(slots.keys() ^ tensors.keys()):
        reason = "lacks" if key in slots else "has, unlike the model,"
        raise UserError(f"{path}: {WEIGHTS_FILE} {reason} {key}")
    for key, slot in slots.items():
        if tensors[key].shape != slot.shape:
            got, wanted = tuple(tensors[key].shape), tuple(slot.shape)
            raise UserError(f"{path}: {key} is {got}; the model needs {wanted}")
        slot.copy_(tensors[key])
    return Adapter(experts, attention)


def rescaler_tiers(path: Path) -> list[int]:
    """The k that an exported adapter has rescalers for, largest first; none for an adapter of others."""
    if not (path / RESCALERS_FILE).exists():
        return []
    names = (name.removeprefix("k") for name in _read_tensors(path / RESCALERS_FILE))
    return sorted((int(k) for k in names if k.isdecimal()), reverse=True)


def load_rescalers(path: Path, adapted: AdaptedModel) -> dict[int, Tensor]:
    """Tier k -> s [L] of an exported adapter.

    Raises:
        UserError: the file is missing or broken, or does not hold one finite s per MoE layer.
    """
    file, rescalers = path / RESCALERS_FILE, {}
    for name, values in _read_tensors(file).items():
        k = name.removeprefix("k")
        if not k.isdecimal() or values.shape != (len(adapted.layers),) or not bool(values.isfinite().all()):
            shape = tuple(values.shape)
            raise UserError(
                f"{file}: {name} {shape} is no finite s for each of {len(adapted.layers)} MoE layers"
            )
        rescalers[int(k)] = values
    return rescalers


def _peft_tensors(adapter: Adapter, layers: Sequence[MoELayer], r: int) -> Iterator[tuple[str, Tensor]]:
    """PEFT's name of every LoRA matrix with a view of its values: read to save, filled to load."""
    for index, layer in enumerate(layers):
        width = layer.expert_width
        rows = {
            "gate_proj": (("A", "A1", slice(0, r)), ("B", "B1", slice(0, width))),
            "up_proj": (("A", "A1", slice(r, 2 * r)), ("B", "B1", slice(width, 2 * width))),
            "down_proj": (("A", "A2", slice(None)), ("B", "B2", slice(None))),
        }
        for expert in range(layer.num_experts):
            for projection in EXPERT_PROJECTIONS:
                for letter, bank, part in rows[projection]:
                    value = adapter.experts[f"{index}.{bank}"][expert, part]
                    name = f"base_model.model.{layer.name}.experts.{expert}.{projection}.lora_{letter}.weight"
                    yield name, value
    for name, value in adapter.attention.items():
        module, _, letter = name.rpartition(".")
        yield f"base_model.model.{module}.lora_{letter}.weight", value


def _require_per_expert_layout(model: PreTrainedModel, adapter: Adapter) -> None:
    """Ask PEFT itself whether it turns per-expert names into this family's fused experts."""
    kind = model.config.model_type
    probe = LoraConfig(target_modules=list(EXPERT_PROJECTIONS))
    convert_peft_config_for_transformers(probe, model, conversions=None)
    if set(probe.target_parameters or ()) != {"gate_up_proj", "down_proj"}:
        raise NoPeftLayoutError(f"PEFT reads no per-expert adapter for {kind} models; use --merge")
    for name in adapter.attention:
        if name.split(".")[-2] in EXPERT_PROJECTIONS:
            raise NoPeftLayoutError(f"PEFT reads no adapter with {name} beside the experts' own; use --merge")


def _require_same_scaling(path: Path, settings: AdapterConfig, adapted: AdaptedModel) -> None:
    scaling = adapted.loras[0].scaling
    if settings.r != adapted.r:
        raise UserError(f"{path}: r = {settings.r}; the model is prepared for r = {adapted.r}")
    if settings.lora_alpha / settings.r != scaling:
        raise UserError(
            f"{path}: lora_alpha / r = {settings.lora_alpha / settings.r}; the model has {scaling}"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; no adapter folder") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def _write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    # Copies: safetensors refuses tensors that share memory.
    copies = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors}
    save_file(copies, path, metadata={"format": "pt"})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or no safetensors file: {error}") from error


def _peft_config(config: RunConfig, r: int) -> dict[str, Any]:
    # Written by hand: PEFT's own writer puts target_modules in an order that differs between processes.
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model.model_name_or_path,
        "r": r,
        "lora_alpha": config.adapter.lora_alpha * (r / config.adapter.r),  # lora_alpha / r stays the run's
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [*config.adapter.attention_modules(), *EXPERT_PROJECTIONS],
        "inference_mode": True,
    }
