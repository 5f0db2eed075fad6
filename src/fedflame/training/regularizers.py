"""Terms that a method adds to the loss in a client's objective.

Like weight decay, they change neither s nor experts without a token in the step, which the optimizer skips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedflame.messages import Adapter, RoundPlan


def regularizer(parameters: Adapter, plan: RoundPlan, start: Adapter) -> Tensor | float:
    """Return the sum of the terms that the plan asks for; zero if it asks for none.

    Args:
        parameters: the LoRA values that are trained.
        plan: says which terms, and how strong.
        start: the adapter of the plan, each value on the device of its parameter.
    """
    terms: Tensor | float = 0.0
    if plan.proximal_mu:
        terms += plan.proximal_mu / 2 * squared_distance(parameters, start)
    if plan.rank_penalty:
        terms += plan.rank_penalty * rank_penalty(parameters, plan.kept_rank)
    return terms


def squared_distance(parameters: Adapter, start: Adapter) -> Tensor:
    """Return ||w - w_0||^2 over all LoRA values, the proximal term of FedProx.

    Li et al.: Federated Optimization in Heterogeneous Networks (FedProx), arXiv 1812.06127.
    """
    origin = start.tensors()
    squares = [(value - origin[name]).square().sum() for name, value in parameters.tensors().items()]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum()


def rank_penalty(parameters: Adapter, kept: int) -> Tensor:
    """Return ||B|| ||A|| without the first `kept` ranks; see `Adapter.tail_norms`.

    Cho et al.: HetLoRA, arXiv 2401.06432 (rank self-pruning).
    """
    norm_b, norm_a = parameters.tail_norms(kept)
    return norm_b * norm_a
