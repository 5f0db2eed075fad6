"""A tiny random model of every supported family, held against transformers' own code."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tests.families import EXPERTS, FAMILIES, PAGE, TOP_K, VOCABULARY, causal_class, page, tiny
from tests.random_rows import random_rows
from tests.tiny_models import random_adapter, random_batch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fedflame.config.words import Checkpointed
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.model_shape import read_model_shape
from fedflame.cost.refused_families import REFUSED_FAMILIES
from fedflame.data.batches import Batch
from fedflame.data.encoding import EncodedRow
from fedflame.errors import UserError
from fedflame.messages import Adapter, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.families import MoELayer, find_moe_layers
from fedflame.moe.merged_base import merge_into
from fedflame.training.fine_tune import fine_tune
from fedflame.training.token_loss import token_losses

R, ALPHA = 2, 3.0
S = torch.tensor([0.7, 1.3])
LOOPED = {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2}
every_family = pytest.mark.parametrize("family", FAMILIES)


def adapt(model: PreTrainedModel) -> AdaptedModel:
    return AdaptedModel(model, R, ALPHA, [])


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@every_family
def test_with_b_zero_every_k_computes_what_the_stock_model_built_with_that_k_does(family: str) -> None:
    batch = random_batch()
    adapted = adapt(tiny(family))
    adapted.load(adapted.initial_adapter(0), torch.ones(2))
    found = []
    for k in (1, 2, TOP_K):
        with adapted.active_experts(k):
            found.append(logits(adapted.model, batch))
        stock = logits(tiny(family, k), batch)
        torch.testing.assert_close(found[-1], stock, rtol=0, atol=2e-5 * float(stock.abs().max()))
    assert torch.equal(found[-1], logits(adapted.model, batch)), "k is as before outside the block"
    assert (found[0] - found[1]).abs().max() > 1e-3 and (found[1] - found[2]).abs().max() > 1e-3


@every_family
def test_the_loss_is_that_of_transformers(family: str) -> None:
    batch, model = random_batch(), tiny(family)
    with torch.no_grad():
        expected = model(**vars(batch)).loss
        torch.testing.assert_close(token_losses(adapt(model), batch).mean(), expected, rtol=1e-5, atol=0)


def with_factors(layer: MoELayer, banks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The family's own parameters plus (alpha/r) B A, element by element where an order is at stake."""
    experts, c = layer.experts, ALPHA / R
    weights = {name: value.double() for name, value in experts.named_parameters()}
    a1, b1, a2, b2 = banks.values()
    inner = [
        c * b @ a for b, a in zip(b1.split(layer.expert_width, 1), a1.split(R, 1), strict=True)
    ]  # [E,I,H] each
    if not experts.is_concatenated:
        rows = [part[:, row] for row in range(layer.expert_width) for part in inner]
        product = torch.stack(rows, dim=1)
    else:
        product = torch.cat(inner, dim=1)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    for key, delta in ((name, product), ("down_proj", c * b2 @ a2)):
        weights[key] = weights[key] + (delta.transpose(1, 2) if experts.is_transposed else delta)
    return weights


def eager(experts: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """The loop over experts that transformers has for each family, in float64."""
    before, experts.config._experts_implementation = experts.config._experts_implementation, "eager"
    try:
        return functional_call(experts, weights, inputs)
    finally:
        experts.config._experts_implementation = before


@every_family
def test_outputs_and_every_gradient_equal_the_familys_own_loop_in_float64(family: str) -> None:
    adapted = adapt(tiny(family))
    adapted.load(random_adapter(adapted, scale=0.5), S)
    layer, stock = adapted.layers[1], find_moe_layers(tiny(family))[1]
    generator = torch.Generator().manual_seed(7)
    routing = torch.tensor([[0, 5], [5, 2], [3, 4], [4, 0], [2, 3], [5, 0], [3, 2]])  # none to expert 1
    x = torch.randn(len(routing), layer.hidden_size, generator=generator)
    weights, direction = (
        torch.rand(routing.shape, generator=generator),
        torch.randn(x.shape, generator=generator),
    )
    lora = layer.experts.fedflame
    values = {"x": x.requires_grad_(), "weights": weights.requires_grad_(), "s": lora.s, **lora.banks()}
    y = layer.experts(x, routing, weights)
    actual = [y, *torch.autograd.grad(y, list(values.values()), direction)]
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    factors = with_factors(stock, {name: exact[name] for name in lora.banks()})
    z = exact["s"] * eager(stock.experts, factors, exact["x"], routing, exact["weights"])
    wanted = [z, *torch.autograd.grad(z, list(exact.values()), direction.double())]
    for name, one, other in zip(["y", *values], actual, wanted, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error <= 1e-5, f"{name} is off by {error:.1e}"


@every_family
def test_a_pre_activation_that_is_computed_again_changes_no_bit(family: str) -> None:
    found = []
    modes: list[Checkpointed] = ["none", "experts"]
    for mode in modes:
        adapted = AdaptedModel(tiny(family), R, ALPHA, [], mode)
        adapted.load(random_adapter(adapted, scale=0.5), S)
        token_losses(adapted, random_batch()).mean().backward()
        found.append([parameter.grad for lora in adapted.loras for parameter in lora.parameters()])
    assert all(one.any() for one in found[0])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def rows(count: int = 4) -> list[EncodedRow]:
    return random_rows(range(20, 20 + count), VOCABULARY, seed=3, prompt=1)


@every_family
def test_training_moves_every_bank_of_touched_experts_and_counts_tokens_times_k(family: str) -> None:
    adapted, k = adapt(tiny(family)), 2
    start = random_adapter(adapted)  # without a zero in B, so that A moves in the first step
    plan = RoundPlan(
        round=1,
        client=0,
        seed=1,
        active_experts=k,
        rescaler="learned",
        rescaler_values=torch.ones(2),
        adapter=start,
        learning_rate=0.01,
        weight_decay=0.0,
        batch_size=2,
        max_steps=2,
    )
    update = fine_tune(adapted, rows(), plan, pad_token_id=0)
    assert update.counts.sum(1).tolist() == [update.tokens * k] * 2
    for name, delta in update.delta.experts.items():
        assert torch.equal(delta.flatten(1).any(1), update.counts[int(name[0])] > 0), name
    assert (update.rescaler_values != 1).all()


@every_family
def test_a_merged_checkpoint_computes_what_the_adapted_model_computes(family: str, tmp_path: Path) -> None:
    batch, k = random_batch(), 2
    adapted = adapt(tiny(family))
    adapter = random_adapter(adapted, scale=0.3)
    adapted.load(adapter, S)
    plain = tiny(family, k)
    merge_into(plain, find_moe_layers(plain), adapter, ALPHA / R, S)
    plain.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    with adapted.active_experts(k):
        expected = logits(adapted.model, batch)
    tokens = batch.attention_mask.bool()
    error = (logits(reloaded, batch)[tokens] - expected[tokens]).abs().max()
    assert error <= 1e-4 * expected.abs().max()
    assert (logits(tiny(family, k), batch)[tokens] - expected[tokens]).abs().max() > 1e-2


@every_family
def test_factors_merged_into_the_base_act_as_the_adapter_and_leave_without_a_trace(family: str) -> None:
    batch = random_batch()
    adapted = adapt(tiny(family))
    adapter, zero, one = random_adapter(adapted, scale=0.3), adapted.adapter(), torch.ones(2)
    stock = logits(adapted.model, batch)
    adapted.load(adapter, one)
    beside = logits(adapted.model, batch)
    adapted.load(zero, one, merged=adapter)
    torch.testing.assert_close(
        logits(adapted.model, batch), beside, rtol=0, atol=1e-4 * float(beside.abs().max())
    )
    adapted.load(zero, one, merged=adapter.concatenate(negated(adapter)))
    torch.testing.assert_close(
        logits(adapted.model, batch), stock, rtol=0, atol=1e-4 * float(stock.abs().max())
    )
    adapted.load(zero, one)
    assert torch.equal(logits(adapted.model, batch), stock)


def negated(adapter: Adapter) -> Adapter:
    return replace(
        adapter,
        experts={
            name: -bank if name.endswith(("B1", "B2")) else bank for name, bank in adapter.experts.items()
        },
    )


@every_family
def test_the_config_alone_tells_the_experts_and_the_size_of_the_adapter(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict(), default=str), encoding="utf-8")
    shape, layers = read_model_shape(tmp_path), find_moe_layers(model)
    for layer in layers:
        assert (shape.num_experts, shape.num_experts_per_tok) == (
            layer.num_experts,
            layer.num_experts_per_tok,
        )
        assert (shape.expert_hidden_size, shape.expert_size) == (layer.hidden_size, layer.expert_width)
    assert (shape.moe_layers, layers[0].num_experts, layers[0].num_experts_per_tok) == (2, EXPERTS, TOP_K)
    banks = adapt(model).adapter().experts
    assert adapter_parameters(shape, R, ()).experts == sum(bank.numel() for bank in banks.values())


@pytest.mark.parametrize("family", REFUSED_FAMILIES)
def test_other_families_are_refused_by_name_with_the_reason(family: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": family, "num_experts": 6}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_model_shape(config)
    assert str(caught.value) == f"model {config}: {family} is not supported: {REFUSED_FAMILIES[family]}"


@pytest.mark.parametrize("family", ["hy_v4_vl", "qwen3_vl_moe"])
def test_a_model_that_sees_images_is_refused_by_its_own_name(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_MAPPING[family]().to_dict(), default=str))
    with pytest.raises(UserError, match=f": {family} is not supported: {REFUSED_FAMILIES[family]}$"):
        read_model_shape(tmp_path)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("phimoe", {}),
        ("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe"]}),
        ("zaya", {"num_experts_per_tok": 1}),
        ("inkling2_loop_text", LOOPED),
    ],
)
def test_a_model_that_routes_in_another_way_is_refused_by_name(family: str, sizes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{family} is not supported: {REFUSED_FAMILIES[family]}$"):
        find_moe_layers(tiny(family, **sizes))


def test_a_looped_layer_runs_its_experts_several_times_for_a_token() -> None:
    model, calls = tiny("inkling2_loop_text", **LOOPED), []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_hook(lambda *_, layer=name: calls.append(layer))
    logits(model, random_batch())
    assert calls == [f"model.layers.{layer}.mlp.experts" for layer in (0, 1, 1, 1)]


def test_every_family_that_transformers_routes_is_supported_or_refused() -> None:
    models = Path(transformers.__file__).parent / "models"
    routed = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if re.search(r"^@use_experts_implementation", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = {name.removesuffix("_text") for name in (*FAMILIES, *REFUSED_FAMILIES)}
    assert len(routed) > 60 and routed <= named


def test_families_are_refused_for_having_no_causal_model_only_if_so() -> None:
    for family, reason in REFUSED_FAMILIES.items():
        if "AutoModelForCausalLM" in reason:
            assert causal_class(family) is None, family


@pytest.mark.slow
def test_the_page_of_families_is_as_generated() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.families writes it"


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_documents_name_the_number_of_supported_families(document: str) -> None:
    text = (PAGE.parents[1] / document).read_text(encoding="utf-8")
    assert re.findall(r"(\d+)(?: model)? families", text) == [str(len(FAMILIES))]
