"""Export a finished run: as a PEFT adapter folder, a GGUF LoRA, or merged into a stock checkpoint.

`peft_folder` writes an adapter folder and `peft_reader` reads one. `peft_names`, `layouts` and `lora_config`
hold PEFT's names, layouts and settings. `merged_folder` writes a merged checkpoint, `gguf_file` a GGUF LoRA.
`description` has the facts of a run, and `card` makes a model card of them. `check` loads a folder as a user
does. `fit` refuses a base model that is not the run's. `new_folder` writes folders completely or not at all.
"""

from __future__ import annotations

from fedflame.exports.check import check_export
from fedflame.exports.description import CardFacts, TrainedRun
from fedflame.exports.gguf_file import export_gguf
from fedflame.exports.layouts import Layout
from fedflame.exports.merged_folder import merge_checkpoint
from fedflame.exports.peft_folder import export_adapter
from fedflame.exports.peft_names import NoPeftLayoutError
from fedflame.exports.peft_reader import (
    AdapterSettings,
    load_adapter,
    load_rescalers,
    load_tier_adapters,
    read_settings,
    rescaler_tiers,
)

__all__ = [
    "AdapterSettings",
    "CardFacts",
    "Layout",
    "NoPeftLayoutError",
    "TrainedRun",
    "check_export",
    "export_adapter",
    "export_gguf",
    "load_adapter",
    "load_rescalers",
    "load_tier_adapters",
    "merge_checkpoint",
    "read_settings",
    "rescaler_tiers",
]
