"""Choose the device that computes: the CPU or a CUDA card. Only where a card may be is torch imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedflame.errors import UserError

DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of these is there where NVIDIA's driver is: on Linux, and on Linux inside Windows."""
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
ALL_CARDS = "balanced"
"""The device that is all cards together, each with some of the layers. The word is transformers'."""


@dataclass(frozen=True)
class Card:
    """A CUDA card that torch can use."""

    name: str
    """The card's name in torch, such as cuda:0."""
    model: str
    memory: int
    """All bytes of the card, free or not."""
    capability: tuple[int, int]
    """Its compute capability; 9.0 is (9, 0)."""


@dataclass(frozen=True)
class DeviceChoice:
    """The device that computes, and why it was chosen."""

    name: str
    """The device's name in torch, such as cpu or cuda:0; or `ALL_CARDS`."""
    reason: str
    cards: tuple[Card, ...] = ()
    """The cards that may be used, the chosen one first. A CPU has none."""

    @property
    def holding(self) -> tuple[Card, ...]:
        """The cards that hold one base: the chosen one, or all together."""
        return self.cards if self.name == ALL_CARDS else self.cards[:1]

    @property
    def memory(self) -> int:
        """All bytes of the cards that hold one base, free or not."""
        return sum(card.memory for card in self.holding)


def choose_device(wanted: str, key: str = "model.device") -> DeviceChoice:
    """Return the wanted device; for `auto`, the first CUDA card, or the CPU if there is no card.

    Without a driver, `auto` is the CPU, and torch is not imported.

    Args:
        wanted: `auto`, `cpu`, `cuda` or a card such as `cuda:1`.
        key: the setting that `wanted` comes from, for messages.

    Raises:
        UserError: a card is wanted that torch cannot use.
    """
    if wanted == "cpu":
        return DeviceChoice("cpu", f"as {key} asks")
    if wanted == "auto" and not any(path.exists() for path in DRIVERS):
        return DeviceChoice("cpu", "this machine has no NVIDIA driver")
    cards = _visible_cards()
    if wanted == "auto":
        if cards:
            return DeviceChoice(cards[0].name, "auto takes a card where there is one", cards)
        return DeviceChoice("cpu", _why_no_card())
    if not cards:
        raise UserError(f"{key} = {wanted!r}: {_why_no_card()}; {_what_to_do(key)}")
    chosen = cards if wanted == "cuda" else tuple(card for card in cards if card.name == wanted)
    if not chosen:
        there = ", ".join(card.name for card in cards)
        raise UserError(f"{key} = {wanted!r}: torch can use {there} here; name one of these, or 'auto'")
    return DeviceChoice(chosen[0].name, f"as {key} asks", chosen)


def device_facts(choice: DeviceChoice) -> dict[str, Any]:
    """Return the device as run folders and plans keep it; for a card also its model, memory and versions."""
    if not choice.cards:
        return {"device": choice.name}
    import torch

    return {
        "device": choice.name,
        "gpu": choice.cards[0].model,
        "gpus": len(choice.holding),
        "gpu_memory": choice.memory,
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }


def device_in_words(choice: DeviceChoice) -> str:
    """Return the device as text: its name, for a card also model, memory and versions, and the reason."""
    facts = device_facts(choice)
    words = [choice.name]
    if "gpu" in facts:
        words += [f"{facts['gpus']} x {facts['gpu']}" if facts["gpus"] > 1 else facts["gpu"]]
        words += [gigabytes(facts["gpu_memory"]), f"CUDA {facts['cuda']}"]
        words += [f"driver {facts['driver']}"] if facts["driver"] else []
    return f"{', '.join(words)} ({choice.reason})"


def gigabytes(size: int) -> str:
    """Return a number of bytes as text, such as "13.8 GB"."""
    return f"{size / 1e9:.1f} GB"


def _visible_cards() -> tuple[Card, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(
        Card(f"cuda:{index}", card.name, card.total_memory, (card.major, card.minor))
        for index, card in enumerate(found)
    )


def _why_no_card() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return f"torch {torch.__version__} finds no card that it can use"


def _what_to_do(key: str) -> str:
    import torch

    if torch.version.cuda is None:
        return f"install a CUDA build of torch, or set {key} to 'cpu'"
    return f"look at nvidia-smi and CUDA_VISIBLE_DEVICES, or set {key} to 'cpu'"


def _driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None where the system does not tell it."""
    if not DRIVER_VERSION.exists():
        return None
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_VERSION.read_text())
    return version[0] if version else None
