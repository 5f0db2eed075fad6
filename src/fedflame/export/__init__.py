"""A finished run as others read it: a PEFT adapter folder, or a merged stock checkpoint.

`peft_folder` writes and reads the adapter, `layouts` and `lora_config` know what PEFT calls its parts,
`merged_folder` writes the checkpoint; `description` words the model card, `fit` refuses a base model that
is not the run's, `new_folder` keeps every write whole.
"""

from __future__ import annotations

from fedflame.export.layouts import Layout
from fedflame.export.merged_folder import merge
from fedflame.export.peft_folder import (
    AdapterSettings,
    NoPeftLayoutError,
    export_adapter,
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
    "export_adapter",
    "load_adapter",
    "load_rescalers",
    "load_tier_adapters",
    "merge",
    "read_settings",
    "rescaler_tiers",
]
