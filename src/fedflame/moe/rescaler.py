"""The rescaler: y_l = s_{i,l} * sum_{j in top-k_i} p_j Expert_j(x) (FLAME, section 3).

One scalar per client and MoE layer, on the routed output only. It multiplies the k routing weights
of a token, which is the same as multiplying the sum and costs k products instead of H.
"""

from __future__ import annotations

from torch import Tensor


def rescale(top_k_weights: Tensor, s: Tensor) -> Tensor:
    """Routing weights [N,k] times the scalar s, in the weights' own dtype; exact for s = 1."""
    return (top_k_weights * s).to(top_k_weights.dtype)


def mass_ratio(mass_at_full_k: Tensor, mass_at_k: Tensor) -> Tensor:
    """[L] routing mass at K over that at k, of the same tokens: what partial activation leaves out."""
    return mass_at_full_k / mass_at_k
