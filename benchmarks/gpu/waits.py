"""Where a step waits for the GPU. A CPU has nothing to wait for."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

SYNCHRONIZES = "synchronizing CUDA operation"
"""What torch's warning says."""


def waits(step: Callable[[], object], device: str) -> dict[str, int]:
    """Run a step that is warmed up; return how often each place of the program has waited."""
    if device == "cpu":
        return {}
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    except RuntimeError as error:
        if SYNCHRONIZES not in str(error):
            raise
        torch.cuda.set_sync_debug_mode("warn")
        return warned(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def warned(step: Callable[[], object]) -> dict[str, int]:
    """Run a step; return where torch warned that it waits, innermost call first, and how often."""
    places: Counter[str] = Counter()

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        if SYNCHRONIZES in str(message):
            places[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        step()
    return dict(places)


def place() -> str:
    """The calls above `show`, of which those of torch's own dispatch say nothing."""
    calls = [call for call in traceback.extract_stack()[:-2] if "warnings.py" not in call.filename]
    short = [f"{'/'.join(call.filename.split('/')[-3:])}:{call.lineno} {call.name}" for call in calls[-8:]]
    return " < ".join(reversed(short))
