"""Activation counts: c_i[l,j], the non-padding tokens that client i routed to expert j of layer l."""

from __future__ import annotations

import torch
from torch import Tensor


class ActivationCounts:
    """Counts the tokens of each expert during training, each token once per step, without waiting for a GPU.

    `begin_step` opens a step, the experts function calls `record`, and `end_step` closes the step. Outside a
    step (evaluation, generation) nothing is counted. Gradient
    checkpointing runs a layer's forward again in the backward: this second `record` of a layer in a step is
    ignored.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        """[L,E], on the device until somebody asks for the values: once, at a round's end."""
        self._step = torch.zeros_like(self.total)
        self._recorded: set[int] = set()
        self._open = False
        self.counted: Tensor | None = None
        """For every token that the experts compute in a step, 1 if it counts, else 0; None if all count."""
        self.real_tokens: Tensor | None = None
        """Indices of the step's non-padding tokens; None if there is no padding, and outside a step."""

    def reset(self) -> None:
        """Set the counts to zero, at the start of a client's round."""
        self.total.zero_()

    def begin_step(self, real_tokens: Tensor | None, counted: Tensor | None = None) -> None:
        """Open a step.

        Args:
            real_tokens: the indices of the tokens that the experts compute; None for all.
            counted: for every token that they compute, int64, 1 if it counts, else 0; None if all count.
        """
        self._open = True
        self.real_tokens, self.counted = real_tokens, counted
        self._recorded.clear()
        self._step.zero_()

    def record(self, layer: int, per_expert: Tensor) -> None:
        """Record the non-padding tokens `per_expert` [E] of one layer, if a step is open."""
        if not self._open or layer in self._recorded:
            return
        self._recorded.add(layer)
        self._step[layer] = per_expert

    def abandon_step(self) -> None:
        """Close the step without counting it."""
        self._open, self.real_tokens, self.counted = False, None, None

    def untouched(self) -> Tensor:
        """Return that no expert has seen a token, bool [L,E]."""
        return torch.zeros_like(self.total, dtype=torch.bool)

    def touched(self) -> Tensor:
        """Return which experts have seen a token in this step, bool [L,E]."""
        return self._step > 0

    def end_step(self) -> Tensor:
        """Close the step, add its counts to `total`, and return the experts it `touched`, bool [L,E]."""
        self._open, self.real_tokens, self.counted = False, None, None
        self.total += self._step
        return self.touched()
