"""Compute the negative log-likelihood of labelled tokens in chunks, so that not all logits exist at once.

The output embedding is frozen, so the backward needs only the gradient of each chunk's hidden states. This
gradient is computed while the chunk's logits exist, as in fused linear cross entropy (Hsu et al.: Liger
Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from fedflame.data.batches import IGNORE_INDEX, Batch
from fedflame.moe.adapted_model import AdaptedModel

Head = Callable[[Tensor], Tensor]
"""Maps hidden states [T,H] to logits [T,V], including the family's scaling and caps."""

CHUNK = 128
"""Tokens per chunk: with a vocabulary of 50,000 its logits take 26 MB in float32."""


def token_losses(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of each labelled token in nats, row by row, [T] in float32.

    The output embedding is applied only at labelled positions; this saves its cost for the prompt tokens.
    """
    decoder = adapted.model.get_decoder()
    output = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    labels = batch.labels[:, 1:]
    labelled = labels != IGNORE_INDEX

    def logits(states: Tensor) -> Tensor:
        output.last_hidden_state = states.unsqueeze(0)
        with _returning(decoder, output):
            of_states: Tensor = adapted.model(input_ids=batch.input_ids[:1], use_cache=False).logits[0]
        return of_states

    return token_loss(output.last_hidden_state[:, :-1][labelled], labels[labelled], logits)


@contextmanager
def _returning(module: nn.Module, output: object) -> Iterator[None]:
    """Let the module return `output` at once within the block.

    The model around it then computes logits from `output` exactly as its family does (scaling, caps).
    """
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward


def token_loss(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Return the loss of each token in nats, [T] in float32. Gradients flow to `hidden`, but not into `head`.

    Args:
        hidden: [T,H] states that predict the labels.
        labels: [T] token ids.
        head: the frozen output embedding.
    """
    losses: Tensor = _TokenLoss.apply(hidden, labels, head)  # type: ignore[no-untyped-call]
    return losses


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
        losses, gradients = [], []
        for states, wanted in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                states = states.detach().requires_grad_(ctx.needs_input_grad[0])
                loss = cross_entropy(head(states).float(), wanted, reduction="none")
            losses.append(loss.detach())
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(loss, states, torch.ones_like(loss))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * d_losses.unsqueeze(1).to(gradients.dtype), None, None
