from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedflame.training.token_loss import token_loss

HIDDEN, VOCABULARY, CHUNK = 7, 11, 16


def problem(tokens: int) -> tuple[Tensor, Tensor, nn.Linear, Tensor]:
    """States, labels, a frozen output embedding, and weights that make every token's gradient its own."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, HIDDEN, generator=generator))
    return hidden, labels, head, torch.rand(tokens, generator=generator)


@pytest.mark.parametrize("tokens", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_losses_and_gradient_equal_the_full_logits(tokens: int) -> None:
    hidden, labels, head, weights = problem(tokens)
    losses = token_loss(hidden, labels, head, CHUNK)
    expected = cross_entropy(head(hidden).float(), labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), hidden)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_losses_are_float32_for_bfloat16_states_and_the_gradient_is_not() -> None:
    hidden, labels, head, _ = problem(5)
    states = hidden.detach().bfloat16().requires_grad_()
    losses = token_loss(states, labels, head.bfloat16(), CHUNK)
    losses.mean().backward()
    assert losses.dtype == torch.float32
    assert states.grad is not None and states.grad.dtype == torch.bfloat16 and bool(states.grad.any())


def test_full_logits_never_exist() -> None:
    hidden, labels, head, _ = problem(3 * CHUNK)
    seen: list[int] = []

    def watched(states: Tensor) -> Tensor:
        seen.append(len(states))
        logits: Tensor = head(states)
        return logits

    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: saved.append(kept.numel()) or kept,
        lambda kept: kept,  # type: ignore[func-returns-value]
    ):
        token_loss(hidden, labels, watched, CHUNK)
    assert seen == [CHUNK] * 3
    assert max(saved) <= max(CHUNK * VOCABULARY, hidden.numel()), "kept: states of a chunk, or gradients"


def test_without_gradients_none_is_formed() -> None:
    hidden, labels, head, _ = problem(4)
    with torch.no_grad():
        losses = token_loss(hidden, labels, head, CHUNK)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, cross_entropy(head(hidden), labels, reduction="none"))
