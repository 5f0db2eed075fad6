"""Read a PEFT adapter folder, written by us or by others, in either layout, into our banks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedflame.config.sections import AdapterConfig
from fedflame.errors import UserError
from fedflame.exports.layouts import (
    GATE_UP,
    Factors,
    attention_pairs,
    expert_factors,
    is_separate,
    per_expert_pairs,
    split,
    unpack,
)
from fedflame.exports.lora_config import CONFIG_FILE, LoraSettings, is_target, parse_lora_config
from fedflame.exports.new_folder import require_intact
from fedflame.exports.peft_names import (
    PREFIX,
    RESCALERS_FILE,
    WEIGHTS_FILE,
    module_names,
    require_known_weights,
    tier_of,
)
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import MoELayer
from fedflame.reading import read_object, shown


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of an adapter folder that are needed to prepare its model."""

    base_model: str | None
    """The base model as the folder names it; it may have moved since."""
    adapter: AdapterConfig
    """r, lora_alpha, use_rslora and the attention projections in target_modules."""


def read_settings(path: Path) -> AdapterSettings:
    """Read base model, r, lora_alpha and attention projections of an adapter folder.

    r is the largest rank of any projection. Where gate and up are fused but share no rank, each has half of
    the fused rank.

    Raises:
        UserError: `path` is no adapter folder, or has a LoRA variant other than W + c B A.
    """
    require_intact(path)
    lora, tensors = _read_folder(path)
    _require_ranks(path, lora, tensors)
    return AdapterSettings(lora.base_model_name_or_path, _adapter_config(lora, tensors))


def load_adapter(path: Path, adapted: AdaptedModel, seed: int) -> Adapter:
    """Load an adapter folder in either layout as banks for `adapted`, bit for bit if we wrote it.

    If a product has another scale than `adapted`, its B is multiplied by the ratio. A rank that gate and up
    share becomes one rank of each. Projections without LoRA in the folder, and ranks beyond those of a
    product, have the values of the start of a run: B is zero and A is drawn from the seed.

    Raises:
        UserError: `path` is no adapter folder, its r or scale differs from that of `adapted`, or its tensors
            are not exactly those that its settings name for this model.
    """
    require_known_weights(adapted.layers)
    lora, tensors = _read_folder(path)
    _require_same_scaling(path, _adapter_config(lora, tensors), adapted)
    adapter = adapted.initial_adapter(seed)
    slots = list(_slots(lora, adapter, adapted.layers))
    _require_tensors(path, tensors, [name for slot in slots for name in module_names(slot.module)])
    separate = _gate_and_up_are_separate(lora, tensors)
    for slot in slots:
        packed = Factors(*(tensors[name] for name in module_names(slot.module)))
        _require_values(path, slot, packed, lora.rank(slot.module))
        factors = unpack(packed, slot.experts) if slot.experts else packed
        parts = split(factors, separate) if len(slot.views) == 2 else (factors,)
        for view, part in zip(slot.views, parts, strict=True):
            view.fill(part, _ratio(lora.scaling(slot.module), adapted.scale))
    return adapter


def load_tier_adapters(path: Path, adapted: AdaptedModel, seed: int) -> dict[int, Adapter]:
    """Return tier k -> adapter, for the tiers with a subfolder in an exported folder; see `load_adapter`."""
    folders = {tier_of(folder.name): folder for folder in sorted(path.iterdir()) if folder.is_dir()}
    return {k: load_adapter(folder, adapted, seed) for k, folder in folders.items() if k}


def rescaler_tiers(path: Path) -> list[int]:
    """Return the k for which a folder has rescalers, largest first; empty for adapters that others wrote."""
    if not (path / RESCALERS_FILE).exists():
        return []
    tiers = map(tier_of, _read_tensors(path / RESCALERS_FILE))
    return sorted(filter(None, tiers), reverse=True)


def load_rescalers(path: Path, adapted: AdaptedModel) -> dict[int, Tensor]:
    """Return tier k -> rescalers s [L] of an exported adapter; empty for adapters that others wrote.

    Raises:
        UserError: the file is broken, or does not hold one finite s per MoE layer.
    """
    file, rescalers = path / RESCALERS_FILE, {}
    for name, values in (_read_tensors(file) if file.exists() else {}).items():
        k = tier_of(name)
        if not k or values.shape != (len(adapted.layers),) or not bool(values.isfinite().all()):
            shape = tuple(values.shape)
            raise UserError(
                f"{file}: {name} {shape} is no finite s for each of {len(adapted.layers)} MoE layers"
            )
        rescalers[k] = values
    return rescalers


@dataclass(frozen=True)
class _Slot:
    """A LoRA module of a folder, and the views of our banks that it fills."""

    module: str
    views: tuple[Factors, ...]
    """One view, or two (gate and up) where the fused layout has both in one module."""
    experts: int = 0
    """E for a fused module; 0 for a linear one."""


def _slots(lora: LoraSettings, adapter: Adapter, layers: Sequence[MoELayer]) -> Iterator[_Slot]:
    for module, view in attention_pairs(adapter):
        if is_target(module, lora.attention_modules):
            yield _Slot(module, (view,))
    if lora.expert_names:
        for module, view in per_expert_pairs(adapter, layers, lora.expert_names):
            yield _Slot(module, (view,))
        return
    for index, layer in enumerate(layers):
        gate, up, down = expert_factors(adapter, index)
        for wrapper, parameter in lora.wraps(f"{layer.name}.experts").items():
            yield _Slot(wrapper, (gate, up) if parameter == GATE_UP else (down,), layer.num_experts)


def _adapter_config(lora: LoraSettings, tensors: Mapping[str, Tensor]) -> AdapterConfig:
    separate = _gate_and_up_are_separate(lora, tensors)
    ranks = [
        lora.rank(module) // (2 if separate and lora.parameter(module).endswith(f".{GATE_UP}") else 1)
        for module in _modules(tensors)
    ]
    r, modules = max(ranks, default=lora.r), tuple(lora.attention_modules)
    own = AdapterConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, use_rslora=lora.use_rslora, target_modules=modules
    )
    if r == lora.r:
        return own
    return AdapterConfig(r=r, lora_alpha=own.plain_alpha(r), target_modules=modules)


def _gate_and_up_are_separate(lora: LoraSettings, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether gate and up have twice the rank of down and share no rank, as we and PEFT fuse them."""
    fused = [module for module in _modules(tensors) if lora.parameter(module).endswith(f".{GATE_UP}")]
    for module in fused:
        rank, b = lora.rank(module), tensors[module_names(module)[1]]
        down = module.removesuffix(".base_layer")
        if down == module or rank != 2 * lora.rank(down) or not is_separate(b, rank):
            return False
    return bool(fused)


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the modules that have both A and B."""
    ends = (name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors)
    return [module for module in ends if tensors.keys() >= {*module_names(module)}]


def _require_ranks(path: Path, lora: LoraSettings, tensors: Mapping[str, Tensor]) -> None:
    """Refuse ranks that the weights do not have, before anything of that rank is made."""
    modules = _modules(tensors)
    if not modules:
        raise UserError(f"{path}: {WEIGHTS_FILE} has no LoRA weights")
    for module in modules:
        name, rank = module_names(module)[0], lora.rank(module)
        rows = tensors[name].shape[0] if tensors[name].dim() else 0
        if rows < rank:
            raise UserError(f"{path}: {CONFIG_FILE} says rank {rank}; {shown(name)} has {rows}")


def _require_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> None:
    for name in sorted(tensors.keys() ^ set(wanted)):
        reason = "has, unlike the model," if name in tensors else "lacks"
        raise UserError(f"{path}: {WEIGHTS_FILE} {reason} {name}")


def _require_values(path: Path, slot: _Slot, packed: Factors, rank: int) -> None:
    rows, out = rank * (slot.experts or 1), sum(view.b.shape[-2] for view in slot.views)
    shapes = (rows, slot.views[0].a.shape[-1]), (out, rows)
    for name, value, shape in zip(module_names(slot.module), (packed.a, packed.b), shapes, strict=True):
        if value.shape != shape:
            raise UserError(f"{path}: {name} is {tuple(value.shape)}; the model needs {shape}")
        if not bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} has a value that is not finite")


def _read_folder(path: Path) -> tuple[LoraSettings, dict[str, Tensor]]:
    try:
        values = read_object(path / CONFIG_FILE)
    except UserError as error:
        raise UserError(f"{error}; no adapter folder") from error
    return parse_lora_config(path, values), _read_tensors(path / WEIGHTS_FILE)


def _require_same_scaling(path: Path, settings: AdapterConfig, adapted: AdaptedModel) -> None:
    if settings.r != adapted.r:
        raise UserError(f"{path}: r = {settings.r}; the model is prepared for r = {adapted.r}")
    if _ratio(settings.scale, adapted.scale) != 1:
        raise UserError(f"{path}: its scale is {settings.scale:g}; the model has {adapted.scale:g}")


def _ratio(one: float, other: float) -> float:
    """Return the ratio of two scales; 1 also where only the last bits of their roots differ."""
    return 1.0 if math.isclose(one, other, rel_tol=1e-12) else one / other


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or no safetensors file: {error}") from error
