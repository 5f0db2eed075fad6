"""A finished run as others read it: a PEFT adapter folder, or a merged stock checkpoint.

`peft_folder` writes the adapter, `peft_reader` reads one; `peft_names`, `layouts` and `lora_config` know what
PEFT calls its parts,
`merged_folder` writes the checkpoint; `description` words the model card, `fit` refuses a base model that
is not the run's, `new_folder` keeps every write whole.
"""

from __future__ import annotations

from fedflame.exports.description import TrainedRun
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
    "Layout",
    "NoPeftLayoutError",
    "TrainedRun",
    "export_adapter",
    "load_adapter",
    "load_rescalers",
    "load_tier_adapters",
    "merge_checkpoint",
    "read_settings",
    "rescaler_tiers",
]
