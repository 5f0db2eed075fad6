"""Check that what an exported folder holds is active where a user loads it: in transformers, with PEFT.

The oracle is the live model, in fedflame's own forward. Servers that ignore the LoRA of experts without a
word are common, so that the outputs are looked at, not the names alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig

from fedflame.base.adapted import load_adapted_model
from fedflame.base.loading import load_base_model
from fedflame.config.sections import AdapterConfig
from fedflame.errors import UserError
from fedflame.exports.description import TrainedRun
from fedflame.exports.new_folder import RUN_FILE, require_intact
from fedflame.exports.peft_names import tier_key
from fedflame.exports.peft_reader import load_adapter, load_rescalers
from fedflame.messages import Adapter
from fedflame.moe.active_experts import active_experts
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import find_moe_layers
from fedflame.reading import read_object
from fedflame.seeds import generator
from fedflame.strategies.base import ServerState

ROWS, LENGTH = 4, 32
"""Of the random tokens that the outputs are compared on."""
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""By the dtype of the folder's weights: how far the logits may be off, as a share of their norm. Merged
weights are rounded to their dtype; all products are computed in float32."""


@dataclass(frozen=True)
class Checked:
    """One k of a folder that acts as the live model does."""

    active_experts: int
    effect: float
    """How far the logits are from those of the base alone, as a share of their norm."""
    error: float
    """How far they are from the live model's."""
    tolerance: float

    def in_words(self) -> str:
        """Return the result in a line."""
        told = (
            "" if self.effect > self.tolerance else "; the adapter does too little to be told from rounding"
        )
        return (
            f"checked at k = {self.active_experts}: its logits are {self.effect:.1e} of their norm from the "
            f"base's and {self.error:.1e} from the run's (at most {self.tolerance:g}){told}"
        )


def check_export(folder: Path, state: ServerState, run: TrainedRun, device: str = "cpu") -> list[Checked]:
    """Load a folder as a user does, and hold its outputs to those of the live model.

    An adapter folder is checked at the model's K, and each adapter of one k below it at that k, without the
    rescaler, which PEFT has no place for. A merged checkpoint is checked at its k with the rescaler.

    Args:
        folder: what `export_adapter` or `merge_checkpoint` wrote.
        state: what it was written from.
        run: the base model's name, rank and scale.
        device: where to compute, in float32.

    Raises:
        UserError: a file is damaged, a value is not the run's, or the outputs are not.
    """
    require_intact(folder)
    k = read_object(folder / RUN_FILE).get("merged_at")
    if k is not None:
        return [_check_merged(folder, int(k), state, run, device)]
    return list(_check_adapters(folder, state, run, device))


def _check_adapters(folder: Path, state: ServerState, run: TrainedRun, device: str) -> Iterator[Checked]:
    adapted = _live(state, run, device)
    full = adapted.num_experts_per_tok
    folders = {full: folder} | {k: folder / tier_key(k) for k in state.tier_adapters}
    _require_rescalers(folder, state, adapted)
    plain, live = {}, {}
    for k, place in folders.items():
        _require_same(place, load_adapter(place, adapted, 0), state.total_at(k))
        ones = torch.ones(len(adapted.layers))
        plain[k], live[k] = _base_and_live(adapted, state.total_at(k), ones, k)
    tokens = _tokens(adapted.vocabulary)
    del adapted
    for k, place in folders.items():
        model, _ = load_base_model(run.base_model, "float32", device)
        with active_experts(find_moe_layers(model), k), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, on patterns that are for parameters
            got = _logits(PeftModel.from_pretrained(model, place), tokens)
        yield _compared(place, k, got, plain[k], live[k], TOLERANCES["float32"])


def _check_merged(folder: Path, k: int, state: ServerState, run: TrainedRun, device: str) -> Checked:
    adapted = _live(state, run, device)
    s = state.rescaler_at(k, len(adapted.layers))
    plain, live = _base_and_live(adapted, state.total_at(k), s, k)
    tokens = _tokens(adapted.vocabulary)
    del adapted
    stored = str(AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype).removeprefix("torch.")
    model, _ = load_base_model(str(folder), "float32", device)
    tolerance = TOLERANCES.get(stored, TOLERANCES["float32"])
    return _compared(folder, k, _logits(model, tokens), plain, live, tolerance)


def _live(state: ServerState, run: TrainedRun, device: str) -> AdaptedModel:
    """The base in float32, with room for the run's ranks and those that its method merged into the base."""
    r = state.adapter.rank + state.merged.rank
    wide = AdapterConfig(
        r=r, lora_alpha=run.adapter.plain_alpha(r), target_modules=run.adapter.target_modules
    )
    return load_adapted_model(run.base_model, "float32", wide, device=device)[0]


def _base_and_live(adapted: AdaptedModel, adapter: Adapter, s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The logits of the base alone and with the adapter, at k experts per token."""
    tokens, outputs = _tokens(adapted.vocabulary), []
    for value, scalars in ((adapted.initial_adapter(0), torch.ones_like(s)), (adapter, s)):
        adapted.load(value, scalars)
        with adapted.active_experts(k):
            outputs.append(_logits(adapted.model, tokens))
    return outputs[0], outputs[1]


def _tokens(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (ROWS, LENGTH), generator=generator(0, "check"))


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False).logits
    return logits.float().cpu()


def _compared(place: Path, k: int, got: Tensor, plain: Tensor, live: Tensor, tolerance: float) -> Checked:
    effect, error = (float((one - live).norm() / live.norm()) for one in (plain, got))
    if not error <= tolerance:
        raise UserError(
            f"{place}: as transformers loads it, its logits at k = {k} are {error:.1e} of their norm from "
            f"the run's (at most {tolerance:g}); those of the base alone are {effect:.1e} from them"
        )
    return Checked(k, effect, error, tolerance)


def _require_same(place: Path, got: Adapter, wanted: Adapter) -> None:
    values = got.tensors()
    for name, value in wanted.tensors().items():
        if not torch.equal(values[name], value):
            raise UserError(f"{place}: its value {name} is not the run's")


def _require_rescalers(folder: Path, state: ServerState, adapted: AdaptedModel) -> None:
    got: Mapping[int, Tensor] = load_rescalers(folder, adapted)
    for k in sorted(got.keys() | state.rescalers.keys()):
        if k not in got or k not in state.rescalers or not torch.equal(got[k], state.rescalers[k]):
            raise UserError(f"{folder}: its rescaler of k = {k} is not the run's")
