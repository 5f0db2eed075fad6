"""Where figures come from: the machine and the versions, kept beside every run and benchmark."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedflame import __version__

CPU_INFO = Path("/proc/cpuinfo")


def environment() -> dict[str, Any]:
    """Versions, processor, cores, threads of this process and the time in UTC."""
    packages = ("torch", "transformers", "peft", "datasets", "numpy")
    return {package: version(package) for package in packages} | {
        "fedflame": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The model of the CPU; Linux tells it in a file only."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
