"""Exports of four families in both of PEFT's layouts of expert LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedflame.exports import Layout
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "mixtral": ("per-expert", "fused"),
    "olmoe": ("per-expert", "fused"),
    "qwen2_moe": ("fused",),
    "qwen3_moe": ("per-expert", "fused"),
}
EXPERTS = "base_model.model.model.layers.1.mlp.experts"


@dataclass(frozen=True)
class Export:
    base: Path
    adapted: AdaptedModel
    state: ServerState
    folders: dict[Layout, Path]
