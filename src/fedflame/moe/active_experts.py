"""Adaptive activation: run the top k_i experts instead of the model's own K (FLAME, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedflame.errors import UserError
from fedflame.moe.families import MoELayer


@contextmanager
def active_experts(layers: Sequence[MoELayer], k: int) -> Iterator[None]:
    """Let every router pick k experts per token within the block, and its former number after it.

    Raises:
        UserError: k is not between 1 and the model's K.
    """
    full_k = min(layer.num_experts_per_tok for layer in layers)
    if not 1 <= k <= full_k:
        raise UserError(
            f"active_experts {k}: must be between 1 and {full_k} (the model's num_experts_per_tok)"
        )
    before = [layer.top_k for layer in layers]
    for layer in layers:
        layer.set_top_k(k)
    try:
        yield
    finally:
        for layer, top_k in zip(layers, before, strict=True):
            layer.set_top_k(top_k)
