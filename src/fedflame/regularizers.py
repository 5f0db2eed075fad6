"""What a client's objective may have beside the loss, as gradients that are added to those of the loss.

As weight decay, they leave s alone, and experts without a token in the step, which the optimizer skips.
"""

from __future__ import annotations

import torch

from fedflame.messages import Adapter


@torch.no_grad()
def add_proximal_gradient(parameters: Adapter, start: Adapter, mu: float) -> None:
    """Add mu (w - w_0), the gradient of mu/2 ||w - w_0||^2, to what has a gradient of the parameters w.

    Li et al.: Federated Optimization in Heterogeneous Networks (FedProx), arXiv 1812.06127.
    """
    origin = start.tensors()
    for name, parameter in parameters.tensors().items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter - origin[name], alpha=mu)


@torch.no_grad()
def add_rank_penalty_gradient(parameters: Adapter, kept: int, strength: float) -> None:
    """Add the gradient of strength * ||B|| * ||A||, both of the ranks after the first `kept`.

    Cho et al.: HetLoRA, arXiv 2401.06432 (rank self-pruning); see `Adapter.tail_norms`. Where a norm is
    zero it adds nothing.
    """
    norm_b, norm_a = parameters.tail_norms(kept)
    if norm_b == 0 or norm_a == 0:
        return
    values = parameters.tensors()
    gradients = {name: value.grad for name, value in values.items() if value.grad is not None}
    views = Adapter.from_tensors(gradients).factors()
    for name, (b, a) in parameters.factors().items():
        d_b, d_a = views[name]
        d_b[..., kept:].add_(b[..., kept:], alpha=strength * norm_a / norm_b)
        d_a[..., kept:, :].add_(a[..., kept:, :], alpha=strength * norm_b / norm_a)
