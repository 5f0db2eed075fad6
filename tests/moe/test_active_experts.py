from __future__ import annotations

import pytest
import torch
from tests.tiny_models import LAYERS, TOP_K, random_batch, tiny_adapted, tiny_olmoe
from torch import Tensor, nn

from fedflame.errors import UserError
from fedflame.moe.active_experts import active_experts
from fedflame.moe.families import find_moe_layers


def chosen_experts(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Per layer the router's logits, and the experts [N,k] that the experts module was given."""
    logits: list[Tensor] = []
    chosen: list[Tensor] = []
    handles = []
    for block in model.model.layers:
        handles.append(block.mlp.gate.register_forward_hook(lambda _, __, output: logits.append(output[0])))
        handles.append(
            block.mlp.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
        )
    batch = random_batch()
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    return list(zip(logits, chosen, strict=True))


@pytest.mark.parametrize("k", [1, 2, 3, TOP_K])
def test_within_the_block_each_token_goes_to_the_k_experts_of_the_largest_logits(k: int) -> None:
    model = tiny_olmoe()
    with active_experts(find_moe_layers(model), k):
        layers = chosen_experts(model)
    assert len(layers) == LAYERS
    for logits, chosen in layers:
        expected = [sorted(row, reverse=True)[:k] for row in logits.tolist()]
        assert torch.gather(logits, 1, chosen).tolist() == expected


def test_after_the_block_every_router_picks_the_models_own_k() -> None:
    model = tiny_olmoe()
    with active_experts(find_moe_layers(model), 1):
        pass
    assert [chosen.shape[1] for _, chosen in chosen_experts(model)] == [TOP_K] * LAYERS


def test_an_exception_within_the_block_restores_the_models_own_k() -> None:
    model = tiny_olmoe()
    with pytest.raises(ZeroDivisionError), active_experts(find_moe_layers(model), 2):
        raise ZeroDivisionError
    assert [block.mlp.gate.top_k for block in model.model.layers] == [TOP_K] * LAYERS


@pytest.mark.parametrize("k", [-1, 0, TOP_K + 1, 64])
def test_k_outside_one_to_the_models_own_is_refused(k: int) -> None:
    model = tiny_olmoe()
    with pytest.raises(UserError) as caught, active_experts(find_moe_layers(model), k):
        pass
    assert (
        str(caught.value) == f"active_experts {k}: must be between 1 and 4 (the model's num_experts_per_tok)"
    )
    assert [block.mlp.gate.top_k for block in model.model.layers] == [TOP_K] * LAYERS


def test_the_adapted_model_sets_k_on_the_same_routers() -> None:
    adapted = tiny_adapted()
    assert adapted.num_experts_per_tok == TOP_K
    with adapted.active_experts(3):
        assert [chosen.shape[1] for _, chosen in chosen_experts(adapted.model)] == [3] * LAYERS
    assert [chosen.shape[1] for _, chosen in chosen_experts(adapted.model)] == [TOP_K] * LAYERS
