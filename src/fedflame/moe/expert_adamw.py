"""AdamW that updates only the experts that saw a token.

Plain AdamW also moves experts without tokens, by weight decay and old momentum, and the server would average
this noise. Here each expert's slice of a bank has its own moments and step count, and a step updates only the
slices of the experts that saw a token. Banks that require no gradient are not updated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedflame.moe.expert_lora import ExpertLoRA
from fedflame.moe.masked_adamw import BETAS, EPSILON, Moments, masked_adamw

FUSED = {"cpu", "cuda"}
"""Kinds of devices for which torch has AdamW as one kernel."""


class ExpertAdamW:
    """Masked AdamW over the banks, and torch's AdamW over the parameters that every token uses.

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
            (lora.index, bank, Moments.of(bank.data))
            for lora in loras
            for bank in lora.banks().values()
            if bank.requires_grad
        ]
        groups = [(list(shared), weight_decay), (list(unregularized), 0.0)]
        kinds = {parameter.device.type for parameters, _ in groups for parameter in parameters}
        self._others = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for parameters, decay in groups],
            lr=learning_rate,
            betas=BETAS,
            eps=EPSILON,
            fused=kinds <= FUSED,
            capturable=kinds == {"cuda"},
        )
        self._learning_rate, self._weight_decay = learning_rate, weight_decay

    @property
    def param_groups(self) -> list[dict[str, list[nn.Parameter]]]:
        """All trained parameters, in the form in which `torch.amp.GradScaler` looks for their gradients."""
        banks = [bank for _, bank, _ in self._banks]
        others = [parameter for group in self._others.param_groups for parameter in group["params"]]
        return [{"params": [*banks, *others]}]

    def backward(self, loss: Tensor, touched: Tensor) -> None:
        """Run the backward of the loss and one update, for the experts in `touched`, bool [L,E].

        A bank is updated as soon as its gradient is complete, and the gradient is freed then. So the
        gradients of only one layer exist at a time (Lv et al.: LOMO, arXiv 2306.09782). The result is
        bit-identical to `loss.backward()` and then `step`. If the backward fails, some banks have already
        been updated.
        """
        handles = [
            bank.register_post_accumulate_grad_hook(lambda _, at=number: self._step_bank(at, touched))
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
        for number in range(len(self._banks)):
            self._step_bank(number, touched)
        self._step_others()

    @torch.no_grad()
    def _step_bank(self, number: int, touched: Tensor) -> None:
        layer, bank, moments = self._banks[number]
        gradient, bank.grad = bank.grad, None
        assert gradient is not None, "backward reaches every parameter that is trained"
        mask = touched[layer].to(bank.device)
        masked_adamw(bank, moments, gradient, mask, self._learning_rate, self._weight_decay)

    def _step_others(self) -> None:
        self._others.step()
        self._others.zero_grad()
