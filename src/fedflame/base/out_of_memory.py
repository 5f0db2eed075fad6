"""Say in one line that the memory of a device is full, what filled it, and what takes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from fedflame.base.card_memory import training_words
from fedflame.config.words import Checkpointed
from fedflame.errors import OutOfMemory
from fedflame.messages import RoundPlan

SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Texts of errors that torch raises as plain RuntimeError."""
_LESS_KEPT: dict[Checkpointed, str] = {
    "none": "gradient_checkpointing = 'experts' or 'layers', ",
    "experts": "gradient_checkpointing = 'layers', ",
    "layers": "",
}


@contextmanager
def memory_in_words(device: torch.device | str, doing: str, advice: str) -> Iterator[None]:
    """Turn the error of a full memory within the block into one line.

    Args:
        device: the device that computes in the block.
        doing: what the block does.
        advice: what takes less memory.

    Raises:
        OutOfMemory: the memory is full.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_full_memory(error):
            raise
        raise OutOfMemory(
            f"{device} ran out of memory while {doing}; take {advice}a device with more memory"
        ) from error


def training_memory_in_words(
    device: torch.device, plan: RoundPlan, checkpointing: Checkpointed
) -> AbstractContextManager[None]:
    """Return `memory_in_words` for the training of a plan."""
    batch = plan.tokens_per_step, plan.batch_size, plan.packed_length > 0
    doing = training_words(plan.active_experts, *batch, checkpointing)
    return memory_in_words(
        device, doing, f"{_LESS_KEPT[checkpointing]}fewer tokens per batch, a smaller adapter.r, or "
    )


def _is_full_memory(error: MemoryError | RuntimeError) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        sign in str(error) for sign in SIGNS
    )
