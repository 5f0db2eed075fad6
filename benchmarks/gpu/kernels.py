"""The kernels of one step, by the profiler; on a CPU its operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KEPT = 60
COPIES = ("Memcpy", "Memset")


def kernels(step: Callable[[], object], device: str) -> dict[str, Any]:
    """Return the number of launches and of copies, the seconds in which any runs, and the longest kernels."""
    on_cuda = device == "cuda"
    kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
        step()
    results: Any = profiled.profiler.kineto_results  # type: ignore[union-attr]
    ran = [
        event for event in results.events() if event.device_type() == kind and not event.is_user_annotation()
    ]
    taken: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in ran:
        taken[event.name()] += event.duration_ns()
        times[event.name()] += 1
    copies = sum(count for name, count in times.items() if name.startswith(COPIES))
    longest = [
        {"kernel": name[:160], "seconds": duration / 1e9, "launches": times[name]}
        for name, duration in taken.most_common(KEPT)
    ]
    spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in ran]
    return {
        "launches": len(ran) - copies,
        "copies": copies,
        "busy_seconds": covered(spans) / 1e9,
        "kernels": longest,
    }


def covered(spans: list[tuple[int, int]]) -> int:
    """The length of the union of the spans."""
    total = reached = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
