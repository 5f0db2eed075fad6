"""Two runs of one experiment that must come to the same: by sites and in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tests.tiny_runs import adapter_bytes, events

SUMS = ("round", "client", "active_experts", "rank", "rows", "response_tokens", "loss_sum",
        "exact_matches", "rouge_l_sum")  # fmt: skip


def sums(run: Path) -> list[tuple[Any, ...]]:
    """What each client told of rows of its own."""
    return [tuple(event[name] for name in SUMS) for event in events(run, "client_evaluation")]


def tiers(run: Path) -> list[dict[str, Any]]:
    """What that comes to, by tier."""
    return events(run, "federated_evaluation")


def assert_same(run: Path, finished: Path) -> None:
    """Every adapter is that of the finished run, byte for byte, and so is what the clients told."""
    assert adapter_bytes(run) == adapter_bytes(finished)
    of_each_k = [*finished.glob("adapter/k*/adapter_model.safetensors")]
    assert of_each_k
    for path in of_each_k:
        assert (run / path.relative_to(finished)).read_bytes() == path.read_bytes(), path
    assert sums(run) == sums(finished) and tiers(run) == tiers(finished)
    assert not events(run, "excluded") and not events(run, "evaluation_excluded")


def assert_same_but_for_rounded_sums(run: Path, unmasked: Path) -> None:
    """The adapter is that of the run without masks, but for the rounding of sums; no client was left out."""
    found, wanted = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, unmasked))
    assert found.keys() == wanted.keys()
    assert any(bool((found[name] != wanted[name]).any()) for name in found), "sums are rounded"
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() < 1e-5, name
    assert not events(run, "excluded")
