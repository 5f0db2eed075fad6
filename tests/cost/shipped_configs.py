"""The configs of real models that are shipped, and the sizes of what tests plan on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "configs" / "models"
OLMOE = MODELS / "OLMoE-1B-7B-0924"
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
BATCH, LENGTH, RANK = 2, 7, 3
from_config: Any = AutoModelForCausalLM.from_config
