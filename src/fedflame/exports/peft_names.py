"""The names of files and tensors in an adapter folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedflame.errors import UserError
from fedflame.moe.families import MoELayer

WEIGHTS_FILE = "adapter_model.safetensors"
RESCALERS_FILE = "rescalers.safetensors"
PREFIX = "base_model.model."
"""Prefix of every module name in PEFT's weights file."""


def tier_key(k: int) -> str:
    """Return the name for one k in an adapter folder and in our files, such as `k4`."""
    return f"k{k}"


def tier_of(name: str) -> int:
    """Return the k of a `tier_key`; 0 for any other name."""
    match = re.fullmatch(r"k([1-9][0-9]*)", name)
    return int(match[1]) if match else 0


class NoPeftLayoutError(UserError):
    """PEFT cannot read such an adapter folder for this model family. A merged checkpoint can be written."""


def module_names(module: str) -> tuple[str, str]:
    """Return PEFT's names of a module's A and B."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def require_known_weights(layers: Sequence[MoELayer]) -> None:
    """Raise NoPeftLayoutError if the family stores expert weights in a form that we do not export."""
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
