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

from fedflame.data.batches import IGNORE_INDEX, Batch, PlacedBatch
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.causal_attention import packed, right_padded
from fedflame.moe.compiled import compiled_on_cuda

Head = Callable[[Tensor], Tensor]
"""Maps hidden states [T,H] to logits [T,V], including the family's scaling and caps."""

CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Bytes of a chunk's logits in float32, by kind of device: they fit a CPU's cache, and fill a GPU."""


def token_losses(adapted: AdaptedModel, batch: Batch | PlacedBatch) -> Tensor:
    """Return the negative log-likelihood of each labelled token in nats, row by row, [T] in float32.

    The output embedding is applied only at labelled positions; this saves its cost for the prompt tokens.
    The result lies on the device of the model, and nothing has waited for it.
    """
    decoder, device = adapted.model.get_decoder(), adapted.device
    placed = batch.on(device) if isinstance(batch, Batch) else batch
    input_ids, _, predictors, targets, *_ = placed
    output = decoded(adapted, placed)

    def logits(states: Tensor) -> Tensor:
        output.last_hidden_state = states.unsqueeze(0)
        with _returning(decoder, output):
            of_states: Tensor = adapted.model(input_ids=input_ids[:1], use_cache=False).logits[0]
        return of_states

    states = output.last_hidden_state.flatten(0, 1)
    states, targets = states.index_select(0, predictors.to(states.device)), targets.to(states.device)
    vocabulary = adapted.model.config.get_text_config().vocab_size
    chunk = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary)
    return token_loss(states, targets, logits, max(1, chunk))


def row_losses(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Return the mean loss of each row's labelled tokens, [B]; zero for a row that has none."""
    labelled = (batch.labels[:, 1:] != IGNORE_INDEX).to(adapted.device)
    row = labelled.nonzero()[:, 0]
    counts = labelled.sum(1)
    total = torch.zeros(len(counts), device=adapted.device)
    return total.index_add(0, row, token_losses(adapted, batch)) / counts.clamp(min=1)


def decoded(adapted: AdaptedModel, batch: PlacedBatch) -> Any:
    """Return the output of the model's decoder on a batch, with attention within rows."""
    decoder, mask, positions = adapted.model.get_decoder(), batch.attention_mask, batch.position_ids
    if positions is None:
        with right_padded(adapted.model):
            return decoder(input_ids=batch.input_ids, attention_mask=mask, use_cache=False)
    with packed(adapted.model, positions):
        return decoder(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        )


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


def token_loss(hidden: Tensor, labels: Tensor, head: Head, chunk: int) -> Tensor:
    """Return the loss of each token in nats, [T] in float32. Gradients flow to `hidden`, but not into `head`.

    Args:
        hidden: [T,H] states that predict the labels.
        labels: [T] token ids.
        head: the frozen output embedding.
        chunk: tokens whose logits exist at a time.
    """
    losses: Tensor = _TokenLoss.apply(hidden, labels, head, chunk)  # type: ignore[no-untyped-call]
    return losses


@compiled_on_cuda(varying=2)
def _losses_and_gradients(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses [T] in float32, and their gradients by the logits [T,V], in the logits' dtype."""
    log_probabilities = logits.float().log_softmax(1)
    losses = -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    right = torch.arange(logits.shape[1], device=logits.device) == labels.unsqueeze(1)
    return losses, log_probabilities.exp_().sub_(right.float()).to(logits.dtype)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head, chunk: int) -> Tensor:
        losses, gradients = [], []
        for states, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                states = states.detach().requires_grad_(ctx.needs_input_grad[0])
                logits = head(states)
            if not ctx.needs_input_grad[0]:
                losses.append(cross_entropy(logits.float(), wanted, reduction="none"))
                continue
            loss, d_logits = _losses_and_gradients(logits.detach(), wanted)
            losses.append(loss)
            gradients += torch.autograd.grad(logits, states, d_logits)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * d_losses.unsqueeze(1).to(gradients.dtype), None, None, None
