"""The rescaler: y_l = s_{i,l} * sum_{j in top-k_i} p_j Expert_j(x) (FLAME, section 3).

There is one scalar s per client and MoE layer; it scales the routed output only. The code multiplies the k
routing weights of a token instead of the sum: the result is the same, with k multiplications instead of H.
"""

from __future__ import annotations

from torch import Tensor


def rescale(top_k_weights: Tensor, s: Tensor) -> Tensor:
    """Multiply the routing weights [N,k] by the scalar s and keep their dtype; s = 1 changes no bit."""
    return (top_k_weights * s).to(top_k_weights.dtype)


def mass_ratio(mass_at_full_k: Tensor, mass_at_k: Tensor) -> Tensor:
    """Divide the routing mass [L] of the top K experts by that of the top k, for the same tokens."""
    return mass_at_full_k / mass_at_k
