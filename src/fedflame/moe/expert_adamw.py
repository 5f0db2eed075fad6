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
        learning_rate: the same for all parameters; `set_learning_rate` changes it.
        weight_decay: for expert banks and `shared`.
        unregularized: parameters that every token uses, without weight decay.
        max_grad_norm: if not 0, a larger L2 norm of the gradient of all parameters is scaled down to it;
            experts without a token in the step count as zero.
    """

    def __init__(
        self,
        loras: Sequence[ExpertLoRA],
        shared: Iterable[nn.Parameter],
        learning_rate: float,
        weight_decay: float,
        unregularized: Iterable[nn.Parameter] = (),
        max_grad_norm: float = 0.0,
    ) -> None:
        self._banks = [
            (lora.index, bank, Moments.of(bank.data))
            for lora in loras
            for bank in lora.banks().values()
            if bank.requires_grad
        ]
        groups = [(list(shared), weight_decay), (list(unregularized), 0.0)]
        devices = [parameter.device for parameters, _ in groups for parameter in parameters]
        kinds = {device.type for device in devices}
        can_capture = kinds == {"cuda"}
        self._rates = {
            bank.device: bank.new_full((), learning_rate, dtype=torch.float64)
            for _, bank, _ in self._banks
            if bank.device.type != "cpu"
        }
        self._others = torch.optim.AdamW(
            [{"params": parameters, "weight_decay": decay} for parameters, decay in groups],
            lr=torch.full((), learning_rate, device=devices[0]) if can_capture else learning_rate,
            betas=BETAS,
            eps=EPSILON,
            fused=kinds <= FUSED,
            capturable=can_capture,
        )
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self._max_grad_norm = max_grad_norm

    def set_learning_rate(self, learning_rate: float) -> None:
        """Take the next steps with this rate.

        On a GPU it is a value on the device, which captured steps read.
        """
        self._learning_rate = learning_rate
        for rate in self._rates.values():
            rate.fill_(learning_rate)
        for group in self._others.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

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
        been updated. A norm needs all gradients at once.
        """
        if self._max_grad_norm:
            loss.backward()
            self.step(touched)
            return
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
        if self._max_grad_norm:
            self._clip(touched)
        for number in range(len(self._banks)):
            self._step_bank(number, touched)
        self._step_others()

    def _clip(self, touched: Tensor) -> None:
        for layer, bank, _ in self._banks:
            assert bank.grad is not None, "backward reaches every parameter that is trained"
            resting = ~touched[layer].to(bank.device).view(-1, 1, 1)
            bank.grad.masked_fill_(resting, 0)  # terms such as FedProx give them a gradient, too
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], self._max_grad_norm)

    @torch.no_grad()
    def _step_bank(self, number: int, touched: Tensor) -> None:
        layer, bank, moments = self._banks[number]
        gradient, bank.grad = bank.grad, None
        assert gradient is not None, "backward reaches every parameter that is trained"
        mask = touched[layer].to(bank.device)
        rate = self._rates.get(bank.device, self._learning_rate)
        masked_adamw(bank, moments, gradient, mask, rate, self._weight_decay)

    def _step_others(self) -> None:
        self._others.step()
        self._others.zero_grad()
