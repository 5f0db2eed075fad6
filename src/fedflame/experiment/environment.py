"""Where figures come from: the machine and the versions, kept beside every run and benchmark."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from fedflame import __version__
from fedflame.base.processor import processor


def environment() -> dict[str, Any]:
    """Versions, processor, cores, threads of this process and the time in UTC."""
    packages = ("torch", "transformers", "peft", "datasets", "numpy")
    return {package: version(package) for package in packages} | {
        "fedflame": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
