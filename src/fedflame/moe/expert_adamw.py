"""AdamW that updates only the experts that saw a token.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101.

Plain AdamW also moves experts without tokens, by weight decay and old momentum, and the server would average
this noise. Here each expert's slice of a bank has its own moments and step count, and a step updates only the
slices of the experts that saw a token. Banks that require no gradient are not updated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fedflame.moe.expert_lora import ExpertLoRA

BETAS = (0.9, 0.999)
EPSILON = 1e-8


@dataclass(frozen=True)
class _Moments:
    """A tensor that AdamW updates, with its moments and its step count."""

    value: Tensor
    mean: Tensor
    mean_square: Tensor
    steps: Tensor

    @classmethod
    def at_start(cls, value: Tensor) -> _Moments:
        return cls(value, torch.zeros_like(value), torch.zeros_like(value), value.new_zeros(()))


class ExpertAdamW:
    """torch's fused AdamW over the experts' slices and over the parameters that every token uses.

    Args:
        loras: the expert banks; each expert's slice is updated by itself.
        shared: parameters that every token uses, with weight decay.
        learning_rate: the same for all parameters.
        weight_decay: for expert banks and `shared`.
        unregularized: parameters that every token uses, without weight decay.
    """

    def __init__(
        self,
        loras: Sequence[ExpertLoRA],
        shared: Iterable[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        unregularized: Iterable[nn.Parameter] = (),
    ) -> None:
        self._banks = [
            (lora.index, bank, [_Moments.at_start(expert) for expert in bank.data])
            for lora in loras
            for bank in lora.banks().values()
            if bank.requires_grad
        ]
        self._shared = [(parameter, _Moments.at_start(parameter.data)) for parameter in shared]
        self._unregularized = [(parameter, _Moments.at_start(parameter.data)) for parameter in unregularized]
        self._learning_rate, self._weight_decay = learning_rate, weight_decay

    @property
    def param_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """All trained parameters, in the form in which `torch.amp.GradScaler` looks for their gradients."""
        banks = [bank for _, bank, _ in self._banks]
        others = [parameter for parameter, _ in [*self._shared, *self._unregularized]]
        return [{"params": [*banks, *others]}]

    def backward(self, loss: Tensor, touched: Tensor) -> None:
        """Run the backward of the loss and one update, for the experts in `touched`, bool [L,E].

        A bank is updated as soon as its gradient is complete, and the gradient is freed then. So the
        gradients of only one layer exist at a time (Lv et al.: LOMO, arXiv 2306.09782). The result is
        bit-identical to `loss.backward()` and then `step`. If the backward fails, some banks have already
        been updated.
        """
        experts = _experts(touched)
        handles = [
            bank.register_post_accumulate_grad_hook(lambda _, at=number: self._step_bank(at, experts))
            for number, (_, bank, _) in enumerate(self._banks)
        ]
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        self._step_others()

    def step(self, touched: Tensor) -> None:
        """Run one update from the gradients of the parameters, for the experts in `touched`, bool [L,E]."""
        experts = _experts(touched)
        for number in range(len(self._banks)):
            self._step_bank(number, experts)
        self._step_others()

    def _step_bank(self, number: int, experts: list[list[int]]) -> None:
        layer, bank, moments = self._banks[number]
        gradients = _take_gradient(bank).unbind(0)
        moved = [(gradients[expert], moments[expert]) for expert in experts[layer]]
        self._update(moved, self._weight_decay)

    def _step_others(self) -> None:
        for parameters, weight_decay in ((self._shared, self._weight_decay), (self._unregularized, 0.0)):
            moved = [(_take_gradient(parameter), moments) for parameter, moments in parameters]
            self._update(moved, weight_decay)

    def _update(self, moved: Sequence[tuple[Tensor, _Moments]], weight_decay: float) -> None:
        adamw(
            [moments.value for _, moments in moved],
            [gradient for gradient, _ in moved],
            [moments.mean for _, moments in moved],
            [moments.mean_square for _, moments in moved],
            [],
            [moments.steps for _, moments in moved],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self._learning_rate,
            weight_decay=weight_decay,
            eps=EPSILON,
            maximize=False,
        )


def _experts(touched: Tensor) -> list[list[int]]:
    """Return the indices of the touched experts of each layer."""
    return [layer.nonzero().flatten().tolist() for layer in touched]


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "backward reaches every parameter that is trained"
    return gradient
