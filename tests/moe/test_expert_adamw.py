from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.tiny_models import EXPERTS, LAYERS, random_adapter, random_batch, tiny_adapted
from torch import Tensor, nn

from fedflame.data.batches import Batch
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.training.token_loss import token_losses

LEARNING_RATE, WEIGHT_DECAY = 0.01, 0.3


def draw_touched(steps: int) -> list[Tensor]:
    """Random masks; every expert is touched in the first step, and each rests at least once after it."""
    generator = torch.Generator().manual_seed(5)
    first = torch.ones(LAYERS, EXPERTS, dtype=torch.bool)
    later = [torch.rand(LAYERS, EXPERTS, generator=generator) < 0.6 for _ in range(steps - 1)]
    assert not torch.stack(later).all(0).any() and torch.stack(later).any()
    return [first, *later]


def set_gradients(parameters: Sequence[nn.Parameter], step: int) -> list[Tensor]:
    """Random gradients for every parameter, also for experts that did nothing."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return [parameter.grad.clone() for parameter in parameters]


def start() -> tuple[AdaptedModel, ExpertAdamW, list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """An adapted model, its optimizer, and the banks, the attention LoRA and the rescalers."""
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    banks = [bank for lora in adapted.loras for bank in lora.banks().values()]
    shared, scalars = list(adapted.attention.values()), [lora.s for lora in adapted.loras]
    optimizer = ExpertAdamW(adapted.loras, shared, LEARNING_RATE, WEIGHT_DECAY, unregularized=scalars)
    return adapted, optimizer, banks, shared, scalars


def alone(start: Tensor, gradients: Sequence[Tensor], weight_decay: float) -> Tensor:
    """The value after torch's AdamW took these gradients, with nothing else in the optimizer, in float64."""
    parameter = nn.Parameter(start.double())
    adamw = torch.optim.AdamW(
        [parameter], lr=LEARNING_RATE, weight_decay=weight_decay, foreach=False, fused=False
    )
    for gradient in gradients:
        parameter.grad = gradient.double()
        adamw.step()
    return parameter.detach()


def test_every_expert_equals_adamw_run_on_that_expert_alone() -> None:
    adapted, optimizer, banks, shared, scalars = start()
    parameters = [*banks, *shared, *scalars]
    before = [parameter.detach().clone() for parameter in parameters]
    history: list[list[Tensor]] = []
    touched = draw_touched(6)
    for step, mask in enumerate(touched):
        history.append(set_gradients(parameters, step))
        optimizer.step(mask)
    layer_of = [lora.index for lora in adapted.loras for _ in lora.banks()]
    for number, bank in enumerate(banks):
        for expert in range(EXPERTS):
            steps = [step for step, mask in enumerate(touched) if mask[layer_of[number], expert]]
            seen = [history[step][number][expert] for step in steps]
            expected = alone(before[number][expert], seen, WEIGHT_DECAY)
            torch.testing.assert_close(bank[expert].double(), expected, rtol=0, atol=1e-6)
    for number, parameter in enumerate(parameters[len(banks) :], len(banks)):
        decay = WEIGHT_DECAY if number < len(banks) + len(shared) else 0.0
        expected = alone(before[number], [gradients[number] for gradients in history], decay)
        torch.testing.assert_close(parameter.double(), expected, rtol=0, atol=1e-6)


def test_an_untouched_expert_keeps_its_bits_despite_momentum_and_weight_decay() -> None:
    _, optimizer, banks, shared, scalars = start()
    resting = torch.zeros(LAYERS, EXPERTS, dtype=torch.bool)
    for step in range(3):
        set_gradients([*banks, *shared, *scalars], step)
        optimizer.step(~resting)
    resting[0, 2] = resting[1, 5] = True
    before = [bank.detach().clone() for bank in banks]
    set_gradients([*banks, *shared, *scalars], 9)
    optimizer.step(~resting)
    for number, (bank, old) in enumerate(zip(banks, before, strict=True)):
        moved = [not torch.equal(bank[expert], old[expert]) for expert in range(EXPERTS)]
        assert moved == (~resting[number // 4]).tolist()


def test_a_step_without_any_touched_expert_moves_the_shared_parameters_only() -> None:
    _, optimizer, banks, shared, scalars = start()
    before = [[value.detach().clone() for value in values] for values in (banks, shared, scalars)]
    set_gradients([*banks, *shared, *scalars], 0)
    optimizer.step(torch.zeros(LAYERS, EXPERTS, dtype=torch.bool))
    assert all(torch.equal(old, new) for old, new in zip(before[0], banks, strict=True))
    assert not any(torch.equal(old, new) for old, new in zip(before[1], shared, strict=True))
    assert not any(torch.equal(old, new) for old, new in zip(before[2], scalars, strict=True))


def test_a_step_leaves_no_gradient_behind() -> None:
    _, optimizer, banks, shared, scalars = start()
    set_gradients([*banks, *shared, *scalars], 0)
    optimizer.step(torch.ones(LAYERS, EXPERTS, dtype=torch.bool))
    assert all(parameter.grad is None for parameter in [*banks, *shared, *scalars])


def test_backward_and_update_together_give_the_bits_that_they_give_one_after_the_other() -> None:
    results = []
    for together in (True, False):
        adapted, optimizer, *_ = start()
        for step in range(3):
            batch = random_batch(seed=step)
            with adapted.active_experts(2):
                adapted.counts.begin_step(batch.real_tokens)
                loss = token_losses(adapted, batch).mean()
                if together:
                    optimizer.backward(loss, adapted.counts.touched())
                    adapted.counts.end_step()
                else:
                    loss.backward()
                    optimizer.step(adapted.counts.end_step())
        results.append([*adapted.adapter().tensors().values(), adapted.rescaler_values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_in_backward_a_layer_has_its_gradients_when_those_of_the_layer_above_are_gone() -> None:
    adapted, optimizer, *_ = start()
    lower, upper = (list(lora.banks().values()) for lora in adapted.loras)
    there: list[bool] = []
    for bank in lower:
        bank.register_hook(lambda _: there.extend(other.grad is not None for other in upper))
    batch, everything = random_batch(), torch.ones(LAYERS, EXPERTS, dtype=torch.bool)
    before = [bank.detach().clone() for bank in upper + lower]
    optimizer.backward(token_losses(adapted, batch).mean(), everything)
    assert len(there) == 16 and not any(there)
    assert not any(torch.equal(old, new) for old, new in zip(before, upper + lower, strict=True))
    token_losses(adapted, batch).mean().backward()
    assert all(bank.grad is not None for bank in upper + lower), "no hook is left on the banks"


@pytest.mark.parametrize("k", [1, 2])
def test_from_zero_b_every_bank_of_every_expert_that_is_used_twice_moves_within_two_steps(k: int) -> None:
    adapted, batch = tiny_adapted(), random_batch(prompt=1)
    initial, routed = adapted.initial_adapter(0), record_routing(adapted)
    adapted.load(initial, torch.ones(LAYERS))
    optimizer = ExpertAdamW(adapted.loras, adapted.attention.values(), LEARNING_RATE, 0.0)
    used, moved = [], []
    with adapted.active_experts(k):
        for _ in range(2):
            adapted.counts.begin_step(batch.real_tokens)
            token_losses(adapted, batch).mean().backward()
            optimizer.step(adapted.counts.end_step())
            used.append(used_for_the_loss(routed, batch))
            moved.append(moved_experts(adapted, initial.experts))
    both, never = used[0] & used[1], ~(used[0] | used[1])
    assert both.any(1).all() and never.any()
    for bank in ("B1", "B2"):
        assert torch.equal(moved[0][bank], used[0])
    for bank in ("A1", "A2"):
        assert not moved[0][bank].any(), "with B = 0 the first gradient of A is zero"
    for bank in ("A1", "B1", "A2", "B2"):
        assert moved[1][bank][both].all()
        assert not moved[1][bank][never].any()


def record_routing(adapted: AdaptedModel) -> dict[int, Tensor]:
    """The experts [N,k] of every layer in its latest forward, kept up to date."""
    routed: dict[int, Tensor] = {}
    for index, layer in enumerate(adapted.layers):
        layer.experts.register_forward_pre_hook(
            lambda _, inputs, index=index: routed.update({index: inputs[1]})
        )
    return routed


def used_for_the_loss(routed: dict[int, Tensor], batch: Batch) -> Tensor:
    """Bool [L,E]: the experts of all tokens but the last of each row, which predicts nothing."""
    mask = batch.attention_mask.clone()
    mask[torch.arange(len(mask)), mask.sum(1) - 1] = 0
    used = torch.zeros(LAYERS, EXPERTS, dtype=torch.bool)
    for layer, chosen in routed.items():
        used[layer, chosen[mask.flatten().bool()].flatten()] = True
    return used


def moved_experts(adapted: AdaptedModel, initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per bank, bool [L,E]: whether the expert's slice differs from where it started."""
    now = adapted.adapter().experts
    return {
        bank: torch.stack(
            [
                (now[f"{layer}.{bank}"] != initial[f"{layer}.{bank}"]).flatten(1).any(1)
                for layer in range(LAYERS)
            ]
        )
        for bank in ("A1", "B1", "A2", "B2")
    }


def test_gate_and_up_halves_both_move() -> None:
    adapted, batch = tiny_adapted(), random_batch()
    initial = adapted.initial_adapter(0)
    adapted.load(initial, torch.ones(LAYERS))
    optimizer = ExpertAdamW(adapted.loras, adapted.attention.values(), LEARNING_RATE, 0.0)
    for _ in range(2):
        token_losses(adapted, batch).mean().backward()
        optimizer.step(torch.ones(LAYERS, EXPERTS, dtype=torch.bool))
    now = adapted.adapter().experts
    for name in (f"{layer}.{bank}" for layer in range(LAYERS) for bank in ("A1", "B1")):
        gate, up = (now[name] - initial.experts[name]).chunk(2, dim=1)
        assert gate.flatten(1).any(1).all() and up.flatten(1).any(1).all()
