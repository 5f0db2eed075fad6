"""A finished run as a PEFT adapter folder, and an adapter folder of anyone as banks of ours.

`layouts` has the names and the shapes, `lora_config` the settings. PEFT has no place for the rescaler s:
it stands beside the adapter in a file of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fedflame.config import AdapterConfig, RunConfig
from fedflame.errors import UserError
from fedflame.export.description import adapter_card, run_facts
from fedflame.export.fit import require_fit
from fedflame.export.layouts import (
    GATE_UP,
    ExpertNames,
    Factors,
    Layout,
    attention_pairs,
    expert_factors,
    fused_pairs,
    is_separate,
    per_expert_pairs,
    split,
    unpack,
)
from fedflame.export.lora_config import (
    CONFIG_FILE,
    LoraSettings,
    expert_names_of,
    is_target,
    lora_config,
    parse_lora_config,
)
from fedflame.export.new_folder import RUN_FILE, new_folder, write_json
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import MoELayer, find_moe_layers
from fedflame.strategies.base import ServerState

WEIGHTS_FILE = "adapter_model.safetensors"
RESCALERS_FILE = "rescalers.safetensors"
PREFIX = "base_model.model."
"""Before every module name in PEFT's weights file."""


def tier_name(k: int) -> str:
    """What belongs to one k is called, in an adapter folder and in our own files."""
    return f"k{k}"


def tier_of(name: str) -> int:
    """The k of a `tier_name`; 0 of another name."""
    match = re.fullmatch(r"k([1-9][0-9]*)", name)
    return int(match[1]) if match else 0


class NoPeftLayoutError(UserError):
    """There is no such adapter folder for this model family; a merged checkpoint can be written."""


@dataclass(frozen=True)
class AdapterSettings:
    """What has to be known of an adapter folder before its model can be prepared."""

    base_model: str | None
    """As the folder names it; it may have been moved since."""
    adapter: AdapterConfig
    """r, lora_alpha and the attention projections in target_modules."""


def export_adapter(
    state: ServerState,
    config: RunConfig,
    model: PreTrainedModel,
    to: Path,
    rounds: int,
    overwrite: bool = False,
    layout: Layout | None = None,
) -> Layout:
    """Write the folder that `PeftModel.from_pretrained(base, to)` loads; outputs equal ours at k = K.

    Merged factors are further ranks of the adapter, with lora_alpha / r as it was. Beside PEFT's two files:
    `rescalers.safetensors` ("k4": [L] for the tier k = 4), `fedflame.json`, and the model card README.md.
    An adapter that the method keeps for one k has PEFT's two files in a folder below, such as `k4`.

    Args:
        state: adapter, rescalers and merged factors of the run.
        config: the run's configuration.
        model: the base model, plain or adapted. Only its structure is read: the meta device will do.
        to: the folder to make.
        rounds: federated rounds that led to `state`, for the model card.
        overwrite: replace an earlier export; no other folder is ever replaced.
        layout: None for per-expert where PEFT reads it for this model family, else fused.

    Returns:
        The layout written.

    Raises:
        UserError: `to` holds something, the disk is full, the model is not the run's, or PEFT cannot read
            this layout for this model family.
    """
    layers = find_moe_layers(model)
    r = config.adapter.r + state.merged.rank
    full_k = layers[0].num_experts_per_tok
    total = state.total_at(full_k)
    require_fit(total, model, layers, r)
    _require_known_weights(layers)
    names = _readable_names(model, total, layout)
    written: Layout = layout or ("per-expert" if names else "fused")
    settings = lora_config(config, r, layers, written, names)
    separate = names if written == "per-expert" else None
    with new_folder(to, overwrite) as folder:
        _write_peft(folder, total, settings, layers, separate)
        for k in state.tier_adapters:
            (folder / tier_name(k)).mkdir()
            _write_peft(folder / tier_name(k), state.total_at(k), settings, layers, separate)
        _write_tensors(folder / RESCALERS_FILE, ((tier_name(k), s) for k, s in state.rescalers.items()))
        write_json(folder / RUN_FILE, run_facts(state, config, layers, rounds))
        (folder / "README.md").write_text(adapter_card(state, config, full_k, rounds), encoding="utf-8")
    return written


def _write_peft(
    folder: Path,
    adapter: Adapter,
    settings: Mapping[str, Any],
    layers: Sequence[MoELayer],
    names: ExpertNames | None,
) -> None:
    """PEFT's two files; per expert under these names, fused without."""
    experts = per_expert_pairs(adapter, layers, names) if names else fused_pairs(adapter, layers)
    _write_tensors(folder / WEIGHTS_FILE, _named_tensors(chain(experts, attention_pairs(adapter))))
    write_json(folder / CONFIG_FILE, settings)


def read_settings(path: Path) -> AdapterSettings:
    """Base model, r, lora_alpha and attention projections of an adapter folder, of ours or of others.

    r is the largest that a projection needs: where PEFT's fused form of a per-expert adapter gives gate and
    up a rank of their own each, half of their common one.

    Raises:
        UserError: no adapter folder, or a LoRA variant other than W + (alpha/r) B A.
    """
    lora, tensors = _read_folder(path)
    return AdapterSettings(lora.base_model_name_or_path, _adapter_config(lora, tensors))


def load_adapter(path: Path, adapted: AdaptedModel, seed: int) -> Adapter:
    """The adapter of a folder in either layout as banks for `adapted`; bit for bit where we wrote it.

    Products of another scale have it in their B; a rank that gate and up share becomes one rank of each.
    What the folder has no LoRA on, and ranks beyond those of a product, are as at the start of a run: B is
    zero, A drawn from the seed.

    Raises:
        UserError: no adapter folder, r or scaling differ from `adapted`'s, or the tensors are not exactly
            those that the folder's settings promise for this model.
    """
    _require_known_weights(adapted.layers)
    lora, tensors = _read_folder(path)
    _require_same_scaling(path, _adapter_config(lora, tensors), adapted)
    adapter = adapted.initial_adapter(seed)
    slots = list(_slots(lora, adapter, adapted.layers))
    _require_tensors(path, tensors, [name for slot in slots for name in _names(slot.module)])
    separate = _gate_and_up_are_separate(lora, tensors)
    for slot in slots:
        packed = Factors(*(tensors[name] for name in _names(slot.module)))
        _require_values(path, slot, packed, lora.rank(slot.module))
        factors = unpack(packed, slot.experts) if slot.experts else packed
        parts = split(factors, separate) if len(slot.views) == 2 else (factors,)
        for view, part in zip(slot.views, parts, strict=True):
            view.fill(part, lora.scaling(slot.module) / adapted.loras[0].scaling)
    return adapter


def load_tier_adapters(path: Path, adapted: AdaptedModel, seed: int) -> dict[int, Adapter]:
    """Tier k -> its adapter, of those that an exported folder has beside its own; see `load_adapter`."""
    folders = {tier_of(folder.name): folder for folder in sorted(path.iterdir()) if folder.is_dir()}
    return {k: load_adapter(folder, adapted, seed) for k, folder in folders.items() if k}


def rescaler_tiers(path: Path) -> list[int]:
    """The k that an exported adapter has rescalers for, largest first; none for an adapter of others."""
    if not (path / RESCALERS_FILE).exists():
        return []
    tiers = map(tier_of, _read_tensors(path / RESCALERS_FILE))
    return sorted(filter(None, tiers), reverse=True)


def load_rescalers(path: Path, adapted: AdaptedModel) -> dict[int, Tensor]:
    """Tier k -> s [L] of an exported adapter; none for an adapter of others.

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
    """One, or gate and up, which the fused layout has in one module."""
    experts: int = 0
    """E of a fused module; 0 of a linear one."""


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


def _names(module: str) -> tuple[str, str]:
    """PEFT's names of a module's A and B."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _named_tensors(pairs: Iterable[tuple[str, Factors]]) -> Iterator[tuple[str, Tensor]]:
    for module, factors in pairs:
        yield from zip(_names(module), (factors.a, factors.b), strict=True)


def _require_known_weights(layers: Sequence[MoELayer]) -> None:
    """Neither layout is written or read here for weights that are stored another way than most."""
    experts = layers[0].experts
    deviations = {
        "no gate": not experts.has_gate,
        "transposed weights": experts.is_transposed,
        "interleaved gate and up rows": not experts.is_concatenated,
    }
    if found := [reason for reason, present in deviations.items() if present]:
        raise NoPeftLayoutError(
            f"no adapter folder for {type(experts).__name__}, which has {' and '.join(found)}; use --merge"
        )


def _readable_names(model: PreTrainedModel, adapter: Adapter, layout: Layout | None) -> ExpertNames | None:
    """The per-expert names that PEFT reads for this family; NoPeftLayoutError if not this layout."""
    kind, names = model.config.model_type, expert_names_of(model)
    if layout == "per-expert" and names is None:
        raise NoPeftLayoutError(f"PEFT reads no per-expert adapter for {kind} models; use --layout fused")
    for module, _ in attention_pairs(adapter):
        if names and module.rpartition(".")[2] in names.projections:
            raise NoPeftLayoutError(
                f"PEFT reads no adapter with {module} beside the experts' own; use --merge"
            )
    return names


def _adapter_config(lora: LoraSettings, tensors: Mapping[str, Tensor]) -> AdapterConfig:
    separate = _gate_and_up_are_separate(lora, tensors)
    ranks = [
        lora.rank(module) // (2 if separate and lora.parameter(module).endswith(f".{GATE_UP}") else 1)
        for module in _modules(tensors)
    ]
    r = max(ranks, default=lora.r)
    targets = ",".join(lora.attention_modules)
    return AdapterConfig(r=r, lora_alpha=lora.lora_alpha * (r / lora.r), target_modules=targets)


def _gate_and_up_are_separate(lora: LoraSettings, tensors: Mapping[str, Tensor]) -> bool:
    """Whether gate and up have twice the rank of down and share none of it, as we and PEFT fuse them."""
    fused = [module for module in _modules(tensors) if lora.parameter(module).endswith(f".{GATE_UP}")]
    for module in fused:
        rank, b = lora.rank(module), tensors[_names(module)[1]]
        down = module.removesuffix(".base_layer")
        if down == module or rank != 2 * lora.rank(down) or not is_separate(b, rank):
            return False
    return bool(fused)


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that have both A and B."""
    ends = (name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors)
    return [module for module in ends if tensors.keys() >= {*_names(module)}]


def _require_tensors(path: Path, tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> None:
    for name in sorted(tensors.keys() ^ set(wanted)):
        reason = "has, unlike the model," if name in tensors else "lacks"
        raise UserError(f"{path}: {WEIGHTS_FILE} {reason} {name}")


def _require_values(path: Path, slot: _Slot, packed: Factors, rank: int) -> None:
    rows, out = rank * (slot.experts or 1), sum(view.b.shape[-2] for view in slot.views)
    shapes = (rows, slot.views[0].a.shape[-1]), (out, rows)
    for name, value, shape in zip(_names(slot.module), (packed.a, packed.b), shapes, strict=True):
        if value.shape != shape:
            raise UserError(f"{path}: {name} is {tuple(value.shape)}; the model needs {shape}")
        if not bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} has a value that is not finite")


def _read_folder(path: Path) -> tuple[LoraSettings, dict[str, Tensor]]:
    return parse_lora_config(path, _read_json(path / CONFIG_FILE)), _read_tensors(path / WEIGHTS_FILE)


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
