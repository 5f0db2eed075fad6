from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tests.tiny_models import (
    ALPHA,
    EXPERTS,
    HIDDEN,
    LAYERS,
    RANK,
    SCALING,
    TOP_K,
    WIDTH,
    merged,
    random_adapter,
    random_batch,
    tiny_adapted,
    tiny_olmoe,
    with_active_experts,
)
from torch import Tensor, nn

from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_lora import BANKS, initial_banks
from fedflame.moe.families import find_moe_layers

ROUTINGS = {
    "k=1, experts 3 and 4 idle": [[0], [2], [2], [5], [1]],
    "k=2, expert 1 idle": [[0, 5], [5, 2], [3, 4], [4, 0], [2, 3], [5, 0]],
    "k=3": [[5, 0, 2], [1, 3, 4], [2, 1, 0], [4, 5, 3]],
    "k=K, expert 5 idle": [[3, 0, 1, 2], [4, 3, 2, 1], [0, 1, 2, 3]],
    "one expert twice for a token": [[3, 3], [0, 3], [3, 0], [3, 3]],
    "all tokens to the last expert": [[5]] * 7,
    "a single token": [[4, 0]],
}


def attached(
    layer: int = 1, r: int = RANK, dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> nn.Module:
    """The experts module of one layer with random banks and a rescaler that is not 1."""
    model = tiny_olmoe(intermediate_size=width).to(dtype)
    adapted = AdaptedModel(model, r, ALPHA, [])
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    return adapted.layers[layer].experts


def leaves(
    experts: nn.Module, routing: list[list[int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Everything the output has a gradient for."""
    generator = torch.Generator().manual_seed(7)
    tokens, k = len(routing), len(routing[0])
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(tokens, k, generator=generator).to(dtype)
    lora = experts.fedflame
    return {"x": x.requires_grad_(), "weights": weights.requires_grad_(), **lora.banks(), "s": lora.s}


def loop(experts: nn.Module, routing: list[list[int]], values: dict[str, Tensor], scaling: float) -> Tensor:
    """The definition, token by token and expert by expert, in float64."""
    gate_up, down = experts.gate_up_proj.double(), experts.down_proj.double()
    width, r = down.shape[2], values["A2"].shape[1]
    rows = []
    for token, chosen in enumerate(routing):
        x, y = values["x"][token], torch.zeros(HIDDEN, dtype=torch.float64)
        for slot, e in enumerate(chosen):
            a1, b1, a2, b2 = (values[name][e] for name in BANKS)
            gate = gate_up[e, :width] @ x + scaling * (b1[:width] @ (a1[:r] @ x))
            up = gate_up[e, width:] @ x + scaling * (b1[width:] @ (a1[r:] @ x))
            hidden = gate * torch.sigmoid(gate) * up
            output = down[e] @ hidden + scaling * (b2 @ (a2 @ hidden))
            y = y + values["weights"][token, slot] * output
        rows.append(values["s"] * y)
    return torch.stack(rows)


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    error = (actual.double() - expected).abs().max()
    assert error <= relative * expected.abs().max(), f"off by {error:.2e}"


def outputs_and_gradients(
    experts: nn.Module, routing: list[list[int]], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The output "y" and every gradient: of the library, and of the loop in float64."""
    values = leaves(experts, routing, dtype)
    y = experts(values["x"], torch.tensor(routing), values["weights"])
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    actual = {"y": y.detach()} | gradients(y, values, direction)
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    y = loop(experts, routing, exact, experts.fedflame.scaling)
    return actual, {"y": y.detach()} | gradients(y, exact, direction.double())


def gradients(y: Tensor, values: dict[str, Tensor], direction: Tensor) -> dict[str, Tensor]:
    return dict(zip(values, torch.autograd.grad(y, list(values.values()), direction), strict=True))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_output_and_every_gradient_equal_the_plain_loop(routing: list[list[int]]) -> None:
    actual, expected = outputs_and_gradients(attached(), routing)
    for name, value in expected.items():
        assert_near(actual[name], value)


@pytest.mark.parametrize("r", [1, 3, 4, 8, 16])
def test_every_rank_equals_the_plain_loop(r: int) -> None:
    actual, expected = outputs_and_gradients(attached(r=r), ROUTINGS["k=2, expert 1 idle"])
    for name, value in expected.items():
        assert_near(actual[name], value)


@pytest.mark.parametrize("r", [4, 8])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_bfloat16_is_as_near_to_the_loop_as_its_precision_allows(routing: list[list[int]], r: int) -> None:
    experts = attached(r=r, dtype=torch.bfloat16, width=40)
    actual, expected = outputs_and_gradients(experts, routing, torch.bfloat16)
    scalar = actual.pop("s") - expected.pop("s")
    for name, value in expected.items():
        assert_near(actual[name], value, 3e-2)
    terms = expected["weights"] * leaves(experts, routing)["weights"].double()
    assert scalar.abs() <= 3e-2 * terms.abs().sum(), (
        "the terms of ds nearly cancel: their size is the measure"
    )


def test_banks_and_their_gradients_are_float32_in_a_bfloat16_model() -> None:
    experts = attached(r=8, dtype=torch.bfloat16, width=40)
    actual, _ = outputs_and_gradients(experts, ROUTINGS["k=3"], torch.bfloat16)
    assert {bank.dtype for bank in experts.fedflame.banks().values()} == {torch.float32}
    assert {actual[name].dtype for name in [*BANKS, "s"]} == {torch.float32}
    assert actual["y"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_gradient_of_an_expert_without_tokens_is_exactly_zero(
    routing: list[list[int]], dtype: torch.dtype
) -> None:
    actual, _ = outputs_and_gradients(attached(r=8, dtype=dtype, width=40), routing, dtype)
    used = {expert for chosen in routing for expert in chosen}
    for expert in range(EXPERTS):
        for name in BANKS:
            assert bool(actual[name][expert].any()) == (expert in used)


def test_two_backward_passes_give_the_same_bytes() -> None:
    first, _ = outputs_and_gradients(attached(), ROUTINGS["one expert twice for a token"])
    second, _ = outputs_and_gradients(attached(), ROUTINGS["one expert twice for a token"])
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_a_pre_activation_that_is_computed_again_changes_no_bit(
    routing: list[list[int]], dtype: torch.dtype
) -> None:
    """In bfloat16 thin products are padded, in float32 they are not."""
    kept, again = (attached(r=8, dtype=dtype, width=40) for _ in range(2))
    again.fedflame.recompute = True
    one, other = (outputs_and_gradients(experts, routing, dtype)[0] for experts in (kept, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_input_without_gradient_leaves_the_others_their_bits() -> None:
    experts, routing = attached(), ROUTINGS["k=2, expert 1 idle"]
    wanted, _ = outputs_and_gradients(experts, routing)
    values = leaves(experts, routing)
    x, weights = values.pop("x").detach(), values["weights"]
    y = experts(x, torch.tensor(routing), weights)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(8))
    found = torch.autograd.grad(y, list(values.values()), direction)
    assert all(torch.equal(value, wanted[name]) for name, value in zip(values, found, strict=True))


def logits(model: nn.Module) -> Tensor:
    batch = random_batch()
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, TOP_K])
def test_with_b_zero_and_s_one_the_logits_are_as_exact_as_those_of_the_stock_model_built_with_k(
    k: int, dtype: torch.dtype
) -> None:
    """Joined products add zeros, and weigh before the last product: other roundings, no more of them."""
    adapted = AdaptedModel(tiny_olmoe(intermediate_size=40).to(dtype), 8, ALPHA, ["q_proj", "v_proj"])
    adapted.load(adapted.initial_adapter(3), torch.ones(LAYERS))
    stock = with_active_experts(k, intermediate_size=40).to(dtype)
    oracle = copy.deepcopy(stock).double()
    oracle.set_experts_implementation("eager")
    exact = logits(oracle)
    with adapted.active_experts(k):
        error = (logits(adapted.model) - exact).norm()
    assert error <= 1.3 * (logits(stock) - exact).norm()


def test_the_stock_models_of_two_k_differ() -> None:
    everything = [logits(with_active_experts(k)) for k in (1, 2, 3, TOP_K)]
    for one, other in itertools.pairwise(everything):
        assert (one - other).abs().max() > 0.05


def test_stock_logits_agree_with_the_eager_loop_of_transformers() -> None:
    adapted = tiny_adapted()
    adapted.load(adapted.initial_adapter(3), torch.ones(LAYERS))
    eager = tiny_olmoe()
    eager.set_experts_implementation("eager")
    torch.testing.assert_close(logits(adapted.model), logits(eager), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, TOP_K])
def test_adapted_logits_equal_those_of_a_model_with_the_products_merged_into_its_weights(k: int) -> None:
    adapted = tiny_adapted()
    adapted.load(random_adapter(adapted), torch.tensor([0.7, 1.3]))
    oracle = merged(adapted, with_active_experts(k))
    tokens = random_batch().attention_mask.bool()
    with adapted.active_experts(k):
        assert_near(logits(adapted.model)[tokens], logits(oracle)[tokens])


def test_scaling_is_alpha_over_r() -> None:
    assert attached().fedflame.scaling == SCALING == 1.5


def test_initial_a_fills_the_peft_bounds_and_b_is_zero() -> None:
    layer = find_moe_layers(tiny_olmoe())[0]
    banks = initial_banks(layer, RANK, torch.Generator().manual_seed(1))
    shapes = {name: tuple(bank.shape) for name, bank in banks.items()}
    assert shapes == {
        "A1": (EXPERTS, 2 * RANK, HIDDEN),
        "B1": (EXPERTS, 2 * WIDTH, RANK),
        "A2": (EXPERTS, RANK, WIDTH),
        "B2": (EXPERTS, HIDDEN, RANK),
    }
    for name, fan_in in {"A1": HIDDEN, "A2": WIDTH}.items():
        bound = fan_in**-0.5
        assert 0.95 * bound < banks[name].abs().max() <= bound
        assert banks[name].mean().abs() < 0.1 * bound
        assert float(banks[name].std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert len(banks[name].unique()) > 0.99 * banks[name].numel()
    assert not banks["B1"].any() and not banks["B2"].any()


def test_initial_banks_follow_their_generator_only() -> None:
    layer = find_moe_layers(tiny_olmoe())[0]
    first, again, other = (
        initial_banks(layer, RANK, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in BANKS)
    assert not torch.equal(first["A1"], other["A1"]) and not torch.equal(first["A2"], other["A2"])


def test_a_copy_of_the_model_without_adapters_still_computes_as_the_stock_model() -> None:
    stock = tiny_olmoe()
    before = logits(copy.deepcopy(stock))
    tiny_adapted()
    assert torch.equal(logits(stock), before)
