"""Time, bytes saved for backward and peak of passes, interleaved in one process on one thread.

On a CPU time is that of the thread, so that other programs hardly touch it, and the peak is what
torch's allocator handed out at most: exact and repeatable, where the process's resident size would
also show heap that an earlier pass left behind. Scratch memory inside a matrix library escapes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from fedflame.bench.methods import Pass
from fedflame.errors import UserError

TOLERANCE_IN_EPSILONS = 8
"""Results of some thousand products differ by a few roundings of their dtype, wrong ones by their size."""


@dataclass(frozen=True)
class Measurement:
    """One method at one size; `all_seconds` are the repeats behind the median `seconds`."""

    seconds: float
    all_seconds: list[float]
    saved_bytes: int
    peak_bytes: int


def measure(
    passes: Mapping[str, Pass], device: str, repeats: int, on_pass: Callable[[str], None]
) -> dict[str, Measurement]:
    """Measure the passes in turn, `repeats` times; the two memory passes before that warm them up."""
    memory = {}
    for name, one in passes.items():
        on_pass(name)
        one.reset()
        saved = saved_bytes(one)
        one.reset()
        memory[name] = (saved, peak_bytes(one.run, device))
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats):
        for name, one in passes.items():
            on_pass(name)
            one.reset()
            taken[name].append(seconds(one.run, device))
    return {name: Measurement(statistics.median(taken[name]), taken[name], *memory[name]) for name in passes}


def require_equal(ours: Pass, oracle: Pass) -> None:
    """UserError unless output and all gradients agree: a benchmark of a wrong thing is worth nothing."""
    results: list[dict[str, Tensor | None]] = []
    for one in (ours, oracle):
        one.reset()
        output = one.run()
        results.append({"output": output, **{f"gradient of {n}": v.grad for n, v in one.leaves.items()}})
    tolerance = TOLERANCE_IN_EPSILONS * torch.finfo(ours.d_output.dtype).eps
    for name, value in results[0].items():
        wanted = results[1][name]
        assert value is not None and wanted is not None, f"{name} is missing"
        error = float((value - wanted).norm() / wanted.norm())
        if not error <= tolerance:
            raise UserError(
                f"ours and composed disagree: {name} by {error:.1e} of its norm, at most {tolerance:.1e} is "
                f"allowed; nothing was timed (torch {torch.__version__})"
            )


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch computes on the calling thread alone, whose CPU time `seconds` reads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(run: Callable[[], object], device: str) -> float:
    """CPU time of this thread, or time on the GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


def saved_bytes(one: Pass) -> int:
    """What autograd keeps from forward to backward: distinct storages, without parameters and input."""
    there_before = {tensor.untyped_storage().data_ptr() for tensor in (*one.leaves.values(), *one.parameters)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there_before:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = one.forward()
    output.backward(one.d_output)
    return sum(kept.values())


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most that torch's allocator handed out at a time during `run`, beside what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with profile(profile_memory=True) as profiled:
        run()
    results: Any = profiled.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda at_and_change: at_and_change[0]):
        total += change
        peak = max(peak, total)
    return peak
