"""AdamW that leaves experts without tokens alone.

Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101.

Plain AdamW moves an expert that saw no token by weight decay and by stale momentum, and the server
would then average noise. Here each expert's slice of a bank has moments and a step count of its own,
and only the slices of touched experts take part in a step. A bank that requires no gradient is left
out.
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
    """A value that AdamW moves as one, and what it remembers of its gradients."""

    value: Tensor
    mean: Tensor
    mean_square: Tensor
    steps: Tensor

    @classmethod
    def at_start(cls, value: Tensor) -> _Moments:
        return cls(value, torch.zeros_like(value), torch.zeros_like(value), value.new_zeros(()))


class ExpertAdamW:
    """torch's fused AdamW over expert slices and over parameters that every token reaches."""

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
        """All trained parameters, as `torch.amp.GradScaler` looks for gradients."""
        banks = [bank for _, bank, _ in self._banks]
        others = [parameter for parameter, _ in [*self._shared, *self._unregularized]]
        return [{"params": [*banks, *others]}]

    def backward(self, loss: Tensor, touched: Tensor) -> None:
        """Gradients of the loss, and one update from them, for experts that `touched` [L,E] names.

        A bank moves as soon as its gradient is complete, which is freed then, so that the gradients of
        one layer exist at a time (Lv et al.: LOMO, arXiv 2306.09782). The values have the bits that
        `loss.backward()` and `step` give. Where the backward fails, some banks have moved.
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
        """One update from the gradients on the parameters, for experts that `touched` [L,E] names."""
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
    """The touched experts of each layer."""
    return [layer.nonzero().flatten().tolist() for layer in touched]


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "backward reaches every parameter that is trained"
    return gradient
