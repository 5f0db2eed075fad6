"""One step of AdamW on a bank, for the experts that saw a token.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101. Which experts take the step is a
mask on the device of the bank, so that nothing waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedflame.moe.compiled import compiled_on_cuda

BETAS = (0.9, 0.999)
EPSILON = 1e-8
CHUNK_BYTES = 2**20
"""On a CPU a bank is updated in pieces of this size, so that their values stay in the cache."""


@dataclass(frozen=True)
class Moments:
    """What AdamW keeps for a bank [E,*]: a mean, a mean square and a step count for each expert."""

    mean: Tensor
    mean_square: Tensor
    steps: Tensor
    """[E] float32."""

    @classmethod
    def of(cls, bank: Tensor) -> Moments:
        """Return those of a bank that has taken no step."""
        return cls(torch.zeros_like(bank), torch.zeros_like(bank), bank.new_zeros(len(bank)))


def masked_adamw(
    bank: Tensor,
    moments: Moments,
    gradient: Tensor,
    touched: Tensor,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Update bank and moments in place, for the experts in `touched`, bool [E]. The others keep every bit.

    Args:
        bank: [E,*] in float32.
        moments: of the bank.
        gradient: [E,*]; whatever it holds for an expert that is not touched counts for nothing.
        touched: on the device of the bank.
        learning_rate: of this step.
        weight_decay: subtracts learning_rate * weight_decay times the value.
    """
    state = (bank, moments.mean, moments.mean_square, moments.steps)
    experts = max(1, CHUNK_BYTES // bank[0].nbytes) if bank.device.type == "cpu" else len(bank)
    for start in range(0, len(bank), experts):
        at = slice(start, start + experts)
        b, mean, mean_square, steps = (value[at] for value in state)
        _step(b, mean, mean_square, steps, gradient[at], touched[at], learning_rate, weight_decay)


@compiled_on_cuda
def _step(
    bank: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    steps: Tensor,
    gradient: Tensor,
    touched: Tensor,
    learning_rate: float,
    weight_decay: float,
) -> None:
    steps += touched
    by_expert = (-1, *[1] * (bank.dim() - 1))
    moves = touched.view(by_expert)
    share = moves.to(bank.dtype)
    count = steps.clamp(min=1).view(by_expert)
    gradient = torch.where(moves, gradient, 0)  # 0 times a value that is not finite would not be 0
    mean.lerp_(gradient, share * (1 - BETAS[0]))
    mean_square.lerp_(gradient * gradient, share * (1 - BETAS[1]))
    root = mean_square.sqrt().mul_((1 - BETAS[1] ** count).rsqrt()).add_(EPSILON)
    if weight_decay:
        bank.mul_(1 - share * (learning_rate * weight_decay))
    bank.addcdiv_(mean * (share * (learning_rate / (1 - BETAS[0] ** count))), root, value=-1)
