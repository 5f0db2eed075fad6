"""Export a run as a PEFT adapter folder.

`layouts` has the names and shapes of the tensors, and `lora_config` the settings. PEFT cannot store the
rescaler s, so s has a file of its own in the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fedflame.checked_json import write_checked
from fedflame.exports.card import adapter_card
from fedflame.exports.description import TEMPLATE_FILE, TrainedRun, run_facts
from fedflame.exports.fit import require_fit
from fedflame.exports.layouts import (
    ExpertNames,
    Factors,
    Layout,
    attention_pairs,
    fused_pairs,
    per_expert_pairs,
)
from fedflame.exports.lora_config import CONFIG_FILE, expert_names_of, lora_config
from fedflame.exports.new_folder import RUN_FILE, checksums, new_folder, write_json
from fedflame.exports.peft_names import (
    RESCALERS_FILE,
    WEIGHTS_FILE,
    NoPeftLayoutError,
    module_names,
    require_known_weights,
    tier_key,
)
from fedflame.messages import Adapter
from fedflame.moe.families import MoELayer, find_moe_layers
from fedflame.strategies.base import ServerState


def export_adapter(
    state: ServerState,
    run: TrainedRun,
    model: PreTrainedModel,
    to: Path,
    overwrite: bool = False,
    layout: Layout | None = None,
) -> Layout:
    """Write a folder that `PeftModel.from_pretrained(base, to)` loads; its outputs equal ours at k = K.

    Merged factors become additional ranks of the adapter, at the same scale. Besides PEFT's two
    files the folder has `rescalers.safetensors` ("k4": [L] for the tier k = 4), `fedflame.json`, and the
    model card README.md. If the method keeps an adapter for one k, a subfolder such as `k4` has PEFT's two
    files for it.

    Args:
        state: adapter, rescalers and merged factors of the run.
        run: the base model's name, rank and scale, and the facts for the model card.
        model: the base model, plain or adapted. Only its structure is read, so it may be on the meta device.
        to: the folder to make.
        overwrite: replace an earlier export. No other folder is ever replaced.
        layout: None means per-expert if PEFT can read it for this model family, else fused.

    Returns:
        The layout that was written.

    Raises:
        UserError: `to` is not empty, the disk is full, the model is not the run's, or PEFT cannot read this
            layout for this model family.
    """
    layers = find_moe_layers(model)
    full_k = layers[0].num_experts_per_tok
    total = state.total_at(full_k)
    r = total.rank
    require_fit(total, model, layers, r)
    require_known_weights(layers)
    names = _readable_names(model, total, layout)
    written: Layout = layout or ("per-expert" if names else "fused")
    settings = lora_config(run, r, layers, written, names)
    separate = names if written == "per-expert" else None
    with new_folder(to, overwrite) as folder:
        _write_peft(folder, total, settings, layers, separate)
        for k in state.tier_adapters:
            (folder / tier_key(k)).mkdir()
            _write_peft(folder / tier_key(k), state.total_at(k), settings, layers, separate)
        _write_tensors(folder / RESCALERS_FILE, ((tier_key(k), s) for k, s in state.rescalers.items()))
        facts = run_facts(state, run, layers) | {"checksums": checksums(folder)}
        write_checked(folder / RUN_FILE, facts)
        if run.prompt.template == "given":
            (folder / TEMPLATE_FILE).write_text(run.prompt.jinja, encoding="utf-8")
        (folder / "README.md").write_text(adapter_card(state, run, full_k), encoding="utf-8")
    return written


def _write_peft(
    folder: Path,
    adapter: Adapter,
    settings: Mapping[str, Any],
    layers: Sequence[MoELayer],
    names: ExpertNames | None,
) -> None:
    """Write PEFT's two files, in the per-expert layout if there are `names`, else in the fused one."""
    experts = per_expert_pairs(adapter, layers, names) if names else fused_pairs(adapter, layers)
    _write_tensors(folder / WEIGHTS_FILE, _named_tensors(chain(experts, attention_pairs(adapter))))
    write_json(folder / CONFIG_FILE, settings)


def _named_tensors(pairs: Iterable[tuple[str, Factors]]) -> Iterator[tuple[str, Tensor]]:
    for module, factors in pairs:
        yield from zip(module_names(module), (factors.a, factors.b), strict=True)


def _readable_names(model: PreTrainedModel, adapter: Adapter, layout: Layout | None) -> ExpertNames | None:
    """Return PEFT's per-expert names of this family. Raises NoPeftLayoutError if PEFT lacks the layout."""
    kind, names = model.config.model_type, expert_names_of(model)
    if layout == "per-expert" and names is None:
        raise NoPeftLayoutError(f"PEFT reads no per-expert adapter for {kind} models; use --layout fused")
    for module, _ in attention_pairs(adapter):
        if names and module.rpartition(".")[2] in names.projections:
            raise NoPeftLayoutError(
                f"PEFT reads no adapter with {module} beside the experts' own; use --merge"
            )
    return names


def _write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    # Copies, because safetensors refuses tensors that share memory.
    copies = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors}
    save_file(copies, path, metadata={"format": "pt"})
