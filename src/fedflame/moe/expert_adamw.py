"""AdamW that leaves experts without tokens alone.

Plain AdamW moves an expert that saw no token by weight decay and by stale momentum, and the server
would then average noise. Here each expert's slice of a bank is a parameter of its own: without a
gradient torch's AdamW skips it, moments, decay and step count included. A bank that requires no
gradient is not taken in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fedflame.moe.expert_lora import ExpertLoRA


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
            (lora.index, bank) for lora in loras for bank in lora.banks().values() if bank.requires_grad
        ]
        self._slices = [[nn.Parameter(expert) for expert in bank.data] for _, bank in self._banks]
        self._shared, self._unregularized = list(shared), list(unregularized)
        decayed = [piece for bank in self._slices for piece in bank] + self._shared
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": self._unregularized, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=learning_rate, fused=True)

    def step(self, touched: Tensor) -> None:
        """One update from the gradients on the banks, for experts that `touched` [L,E] names."""
        for (layer, bank), pieces in zip(self._banks, self._slices, strict=True):
            assert bank.grad is not None, "backward reaches every bank that is trained"
            for piece, gradient, active in zip(pieces, bank.grad, touched[layer].tolist(), strict=True):
                piece.grad = gradient if active else None
        self._adamw.step()
        for parameter in [*(bank for _, bank in self._banks), *self._shared, *self._unregularized]:
            parameter.grad = None
