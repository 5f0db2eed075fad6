"""The errors of a full memory, as torch and Python raise them, become one line; others stay as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.message_samples import a_plan

from fedflame.base.out_of_memory import memory_in_words, training_memory_in_words
from fedflame.config.words import Checkpointed
from fedflame.errors import OutOfMemory

LINE = "cuda:0 ran out of memory while evaluating at k = 8; take a device with more memory"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ..."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_memory_is_one_line(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as full, memory_in_words("cuda:0", "evaluating at k = 8", ""):
        raise error
    assert str(full.value) == LINE and full.value.__cause__ is error


def test_what_torch_says_of_a_full_memory_of_a_cpu_is_known() -> None:
    with pytest.raises(OutOfMemory), memory_in_words(torch.device("cpu"), "testing", ""):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("CUDA error: out of memory")]
)
def test_another_error_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, memory_in_words("cuda:0", "evaluating", ""):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("checkpointing", "less"),
    [
        ("none", "gradient_checkpointing = 'experts' or 'layers', fewer tokens per batch"),
        ("experts", "gradient_checkpointing = 'layers', fewer tokens per batch"),
        ("layers", "fewer tokens per batch"),
    ],
)
def test_no_advice_is_what_is_done_already(checkpointing: Checkpointed, less: str) -> None:
    plan = replace(a_plan(), active_experts=3, tokens_per_step=2048)
    doing = f"training at k = 3 with 2,048 tokens per batch and gradient_checkpointing = '{checkpointing}'"
    cpu = torch.device("cpu")
    with pytest.raises(OutOfMemory) as full, training_memory_in_words(cpu, plan, checkpointing):
        raise MemoryError
    assert str(full.value) == (
        f"cpu ran out of memory while {doing}; take {less}, a smaller adapter.r, or a device with more memory"
    )
