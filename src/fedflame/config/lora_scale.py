"""The factor on a low-rank product B A: that of LoRA, or that of rsLoRA (arXiv 2312.03732)."""

from __future__ import annotations

import math


def lora_scale(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """Return lora_alpha / r, or with rsLoRA lora_alpha / sqrt(r), as PEFT computes it."""
    return lora_alpha / lora_scale_divisor(r, use_rslora)


def lora_scale_divisor(r: int, use_rslora: bool) -> float:
    """Return what lora_alpha is divided by."""
    return math.sqrt(r) if use_rslora else r
