"""Measure time, bytes saved for the backward, and peak memory of passes, interleaved on one thread.

On a CPU, time is the CPU time of the thread, so other programs hardly change it. The peak is the most memory
that torch's allocator held at a time. It is exact and repeatable, while the resident size of the process
would include heap that earlier passes left. Scratch memory inside a matrix library is not counted.
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
"""Allowed relative error in epsilons of the dtype. Rounding gives a few epsilons, a wrong result far more."""


@dataclass(frozen=True)
class Measurement:
    """The measurements of one method at one size. `seconds` is the median of `all_seconds`."""

    seconds: float
    all_seconds: list[float]
    saved_bytes: int
    peak_bytes: int


def measure(
    passes: Mapping[str, Pass], device: str, repeats: int, on_pass: Callable[[str], None]
) -> dict[str, Measurement]:
    """Measure memory first, which also warms up; then time all passes in turn, `repeats` times."""
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
    """Raise UserError unless output and all gradients agree: the time of a wrong result is worth nothing."""
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
    """Let torch compute only on the calling thread within the block, since `seconds` reads its CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(run: Callable[[], object], device: str) -> float:
    """Return the seconds that `run` takes: CPU time of this thread, or time on the GPU."""
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


def median_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median of the seconds that `run` takes, after three runs that are not timed."""
    for _ in range(3):
        run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def saved_bytes(one: Pass) -> int:
    """Return the bytes that autograd keeps for the backward, without parameters and input."""
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
    """Return the most bytes that torch's allocator held during `run`, above those held before."""
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
