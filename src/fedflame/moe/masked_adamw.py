"""One step of AdamW on a bank, for the experts that saw a token.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101. Which experts take the step is a
mask on the device of the bank, so that nothing waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from fedflame.moe.compiled import compiled_on_cuda

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class Moments:
    """What AdamW keeps for a bank [E,*]: a mean, a mean square and a step count for each expert."""

    mean: Tensor
    mean_square: Tensor
    steps: Tensor
    """[E] float32."""

    @cached_property
    def slices(self) -> list[tuple[Tensor, ...]]:
        """The three by expert."""
        return [value.unbind(0) for value in (self.mean, self.mean_square, self.steps)]

    @classmethod
    def of(cls, bank: Tensor) -> Moments:
        """Return those of a bank that has taken no step."""
        return cls(torch.zeros_like(bank), torch.zeros_like(bank), bank.new_zeros(len(bank)))


def masked_adamw(
    bank: Tensor,
    moments: Moments,
    gradient: Tensor,
    touched: Tensor,
    learning_rate: float | Tensor,
    weight_decay: float,
) -> None:
    """Update bank and moments in place, for the experts in `touched`, bool [E]. The others keep every bit.

    Args:
        bank: [E,*] in float32.
        moments: of the bank.
        gradient: [E,*]; whatever it holds for an expert that is not touched counts for nothing.
        touched: on the device of the bank.
        learning_rate: of this step. A captured step reads it again each time if it is a value on the device.
        weight_decay: subtracts learning_rate * weight_decay times the value.
    """
    if bank.device.type == "cpu":
        _update_slices(bank, moments, gradient, touched, learning_rate, weight_decay)
        increment_version(bank)  # a change through slices is not counted
    else:
        state = (moments.mean, moments.mean_square, moments.steps)
        rate = learning_rate  # no constant of the compiled program
        if not isinstance(rate, Tensor):
            rate = bank.new_full((), rate, dtype=torch.float64)
        _update_all(bank, *state, gradient, touched, rate, weight_decay)


def _update_slices(
    bank: Tensor,
    moments: Moments,
    gradient: Tensor,
    touched: Tensor,
    learning_rate: float | Tensor,
    weight_decay: float,
) -> None:
    """Update the touched experts by torch's kernel for a CPU, where `_update_all` takes longer."""
    experts = touched.nonzero().flatten().tolist()
    slices = [bank.unbind(0), gradient.unbind(0), *moments.slices]
    values, gradients, means, mean_squares, counts = ([of[expert] for expert in experts] for of in slices)
    adamw(
        values,
        gradients,
        means,
        mean_squares,
        [],
        counts,
        fused=True,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=learning_rate,
        weight_decay=weight_decay,
        eps=EPSILON,
        maximize=False,
    )


@compiled_on_cuda(varying=0)
def _update_all(
    bank: Tensor,
    mean: Tensor,
    mean_square: Tensor,
    steps: Tensor,
    gradient: Tensor,
    touched: Tensor,
    learning_rate: Tensor,
    weight_decay: float,
) -> None:
    """Go over the whole bank, and let the mask decide, on the device, which experts move."""
    steps += touched
    by_expert = (-1, *[1] * (bank.dim() - 1))
    moves = touched.view(by_expert)
    share = moves.to(bank.dtype)
    count = steps.clamp(min=1).view(by_expert)
    gradient = torch.where(moves, gradient, 0)  # 0 times a value that is not finite would not be 0
    mean.lerp_(gradient, share * (1 - BETAS[0]))
    mean_square.lerp_(gradient * gradient, share * (1 - BETAS[1]))
    root = (mean_square / (1 - BETAS[1] ** count)).sqrt() + EPSILON
    bank.mul_(1 - share * (learning_rate * weight_decay))
    bank.addcdiv_(mean * (share * (learning_rate / (1 - BETAS[0] ** count))), root, value=-1)
