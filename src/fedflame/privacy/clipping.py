"""Bound what one row can add to a sum of gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def add_clipped(sums: Mapping[str, Tensor], gradient: Mapping[str, Tensor], clip_norm: float) -> None:
    """Add a row's gradient to the sums in place, scaled down to an L2 norm of at most `clip_norm`.

    The norm is over all values together: two rows could otherwise differ by more than it. A gradient that is
    not finite adds nothing.

    Abadi et al.: Deep Learning with Differential Privacy, arXiv 1607.00133.
    """
    norms = [torch.linalg.vector_norm(value, dtype=torch.float64) for value in gradient.values()]
    norm = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))
    factor = clip_factors(norm, clip_norm).float()
    for name, value in gradient.items():
        here = factor.to(value.device)
        sums[name].add_(torch.where(here > 0, value * here, 0))


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Return what gradients of these norms are multiplied by; 0 for one that is not finite."""
    return torch.where(norms.isfinite(), (clip_norm / norms).clamp(max=1.0), 0.0)
