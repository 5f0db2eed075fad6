"""Export a run as a GGUF LoRA, which llama.cpp applies to a GGUF of the base model.

A file has, for each weight NAME of the base that has LoRA, NAME.lora_a and NAME.lora_b. The experts of a
layer are one weight there, so that theirs are A [E,r,in] and B [E,out,r]. llama.cpp computes
W x + (alpha/r) B A x, without rsLoRA. The rescaler s has no place: it multiplies W too, and s W - W has full
rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedflame.checked_json import write_checked
from fedflame.errors import UserError
from fedflame.exports.card import gguf_card
from fedflame.exports.description import TrainedRun, run_facts
from fedflame.exports.fit import require_fit
from fedflame.exports.layouts import Factors, attention_pairs, expert_factors
from fedflame.exports.new_folder import RUN_FILE, checksums, new_folder
from fedflame.exports.peft_names import require_known_weights
from fedflame.messages import Adapter
from fedflame.moe.families import MoELayer, find_moe_layers
from fedflame.strategies.base import ServerState

GGUF_FILE = "adapter.gguf"
ARCHITECTURES = {
    "afmoe": "afmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "hunyuan_v1_moe": "hunyuan-moe",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "solar_open": "glm4moe",
}
"""model_type -> llama.cpp's name. Of these families its convert_lora_to_gguf.py (in llama-cpp-python 0.3.36)
makes the same tensors, bit for bit, from our adapter folder."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The projections that were compared; others, such as those of latent attention, it takes apart."""
_PERMUTED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}
"""Architectures whose rotary embedding pairs neighbouring rows, not those of two halves of a head."""


def export_gguf(
    state: ServerState, run: TrainedRun, model: PreTrainedModel, k: int, to: Path, overwrite: bool = False
) -> str:
    """Write a folder with `adapter.gguf`, in float32, and the model card README.md.

    Args:
        state: adapter, rescalers and merged factors of the run.
        run: the base model's name, rank and scale, and the facts for the model card.
        model: the base model; only its structure is used, so that it may lie on the meta device.
        k: experts per token that llama.cpp is to run.
        to: the folder to make.
        overwrite: replace an earlier export. No other folder is ever replaced.

    Returns:
        How to serve it.

    Raises:
        UserError: llama.cpp does not know this family, a weight or a rescaler; the model is not the run's; or
            the folder cannot be written.
    """
    layers = find_moe_layers(model)
    names = _Names.of(model)
    total = state.total_at(k)
    r, full = total.rank, layers[0].num_experts_per_tok
    require_fit(total, model, layers, r)
    require_known_weights(layers)
    _require_no_rescaler(state, k, full)
    advice = serving_advice(names.architecture, k, full)
    tensors = dict(_tensors(total, model, layers, names))
    with new_folder(to, overwrite) as folder:
        _write(folder / GGUF_FILE, names.architecture, run.adapter.plain_alpha(r), tensors)
        facts = run_facts(state, run, layers) | {"gguf_at": k, "checksums": checksums(folder)}
        write_checked(folder / RUN_FILE, facts)
        card = gguf_card(run, GGUF_FILE, k, advice)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return advice


def serving_advice(architecture: str, k: int, full: int) -> str:
    """Return the command that runs k experts per token."""
    override = f" --override-kv {architecture}.expert_used_count=int:{k}" if k != full else ""
    text = f"Run {k} of {full} experts per token, for which it was written: "
    return f"{text}`llama-cli -m BASE.gguf --lora {GGUF_FILE}{override}`."


@dataclass(frozen=True)
class _Names:
    """llama.cpp's names for one architecture, as the package gguf has them."""

    architecture: str
    experts: tuple[str, str, str]
    """Of gate, up and down; `{bid}` stands for the number of the layer."""
    modules: Any
    """gguf's map from the hub's names."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Names:
        """Raises UserError if gguf is not installed or does not know the family."""
        try:
            import gguf
        except ImportError as error:
            raise UserError("--gguf needs the package gguf: pip install 'fedflame[gguf]'") from error
        kind = model.config.model_type
        if kind not in ARCHITECTURES:
            raise UserError(
                f"--gguf: not for {kind} models; it is written for {', '.join(ARCHITECTURES)}, whose LoRA "
                "llama.cpp's converter takes. --merge writes a checkpoint for its convert_hf_to_gguf.py"
            )
        name = ARCHITECTURES[kind]
        architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
        parts = (f"FFN_{part}_EXP" for part in ("GATE", "UP", "DOWN"))
        gate, up, down = (gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[part]] for part in parts)
        blocks = model.config.get_text_config().num_hidden_layers
        return cls(name, (gate, up, down), gguf.get_tensor_name_map(architecture, blocks))

    def module(self, name: str) -> str:
        """Return the name of an attention projection. Raises UserError where there is none."""
        found: str | None = self.modules.get_name(name) if name.endswith(_ATTENTION) else None
        if found is None:
            raise UserError(
                f"--gguf: LoRA on {name} is not written for {self.architecture} models, but on experts, "
                f"{', '.join(_ATTENTION)}"
            )
        return found


def _require_no_rescaler(state: ServerState, k: int, full: int) -> None:
    tiers = sorted({*state.rescalers, full}, reverse=True)
    if k not in tiers:
        allowed = ", ".join(map(str, tiers))
        raise UserError(f"--gguf at k = {k}: no client had this tier; allowed are {allowed}")
    s = state.rescalers.get(k)
    if s is not None and not torch.equal(s, torch.ones_like(s)):
        raise UserError(
            f"--gguf at k = {k}: its rescaler is {float(s.min()):.3f} to {float(s.max()):.3f}, and llama.cpp "
            f"has no place for it; --merge --active-experts {k} writes a checkpoint with it in the weights"
        )


def _tensors(
    adapter: Adapter, model: PreTrainedModel, layers: Sequence[MoELayer], names: _Names
) -> Iterator[tuple[str, Tensor]]:
    for index, layer in enumerate(layers):
        block = re.search(r"\.layers\.(\d+)\.", f".{layer.name}.")
        assert block is not None, f"{layer.name} is no part of a layer"
        for name, stacked in zip(names.experts, expert_factors(adapter, index), strict=True):
            yield from _pair(name.format(bid=block[1]), stacked)
    for module, factors in attention_pairs(adapter):
        yield from _pair(names.module(module), _permuted(factors, module, model, names.architecture))


def _pair(name: str, factors: Factors) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight.lora_a", factors.a
    yield f"{name}.weight.lora_b", factors.b


def _permuted(factors: Factors, module: str, model: PreTrainedModel, architecture: str) -> Factors:
    """Order the rows of B as the architecture orders those of the base weight."""
    key = _PERMUTED.get(architecture, {}).get(module.rpartition(".")[2])
    if key is None:
        return factors
    heads = getattr(model.config.get_text_config(), key)
    rows = factors.b.unflatten(0, (heads, 2, -1)).transpose(1, 2)
    return Factors(factors.a, rows.flatten(0, 2))


def _write(path: Path, architecture: str, alpha: float, tensors: dict[str, Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
