"""CUDA cards that are not there: torch is told of them, and nothing computes on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedflame.base import device
from fedflame.base.adapted import load_adapted_model

MODEL = "NVIDIA H200"
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@build)\n"


def fake_cards(
    patch: pytest.MonkeyPatch,
    folder: Path,
    memory: Sequence[int],
    free: Sequence[int] | None = None,
    capability: tuple[int, int] = (9, 0),
) -> None:
    """One card for each number of bytes, all of the same model; a CUDA build of torch, and a driver."""

    def properties(index: int) -> SimpleNamespace:
        major, minor = capability
        return SimpleNamespace(name=MODEL, total_memory=memory[index], major=major, minor=minor)

    def mem_get_info(card: str | int) -> tuple[int, int]:
        index = int(str(card).removeprefix("cuda:"))
        return (free or memory)[index], memory[index]

    driver = folder / "driver"
    driver.write_text(DRIVER)
    patch.setattr(device, "DRIVERS", (driver,))
    patch.setattr(device, "DRIVER_VERSION", driver)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "is_available", lambda: bool(memory))
    patch.setattr(torch.cuda, "device_count", lambda: len(memory))
    patch.setattr(torch.cuda, "get_device_properties", properties)
    patch.setattr(torch.cuda, "mem_get_info", mem_get_info)


def load_on_cpu(patch: pytest.MonkeyPatch, module: str) -> list[str]:
    """Let a module load its base on the CPU, whatever its device; the list gets the devices asked for."""
    asked = []

    def load(name: str, dtype: Any, adapter: Any, checkpointing: Any = "none", to: str = "cpu") -> Any:
        asked.append(to)
        return load_adapted_model(name, dtype, adapter, checkpointing)

    patch.setattr(f"{module}.load_adapted_model", load)
    return asked
