"""What runs compiled on CUDA, compiled here by the same front end: one graph each, the same values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from tests.tiny_models import ALPHA, ATTENTION, RANK, random_adapter, random_batch, tiny_olmoe
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import grouped_mm

from fedflame.moe import adapted_model, compiled, expert_lora, expert_products, fused_experts
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.expert_adamw import ExpertAdamW
from fedflame.moe.expert_lora import EXPERTS_IMPLEMENTATION
from fedflame.training.steps import training_steps

LAYERS = 6
BATCHES = [(4, (11, 7, 4)), (1, (14, 2)), (4, (5, 5, 5))]
"""k and the lengths of rows: with and without padding, one expert."""
ONE_ROW = [(4, (6,))]
"""One row compiles everything anew, as balanced routers and dropout do."""


@pytest.fixture
def _front_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile on the CPU, by the front end alone: without kernels, which take minutes to build."""
    compile_ = torch.compile

    def traced(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return compile_(function, backend="aot_eager", **options)

    dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(compiled, "can_compile", lambda kind: True)
    monkeypatch.setattr(adapted_model, "can_compile", lambda kind: True)
    monkeypatch.setattr(fused_experts, "_blocks", lambda rows, up: [rows.one_block()])
    kernel = ModuleType("triton_products")  # in float32 the products on a card are operators of ours
    kernel.times = lambda rows, weights, offs: grouped_mm(rows, weights, offs=offs)  # type: ignore[attr-defined]
    kernel.outer = lambda left, right, offs: grouped_mm(left.mT, right, offs=offs)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedflame.moe.triton_products", kernel)
    monkeypatch.setattr("fedflame.moe.triton_products", kernel, raising=False)
    monkeypatch.setattr(expert_products, "_torch_waits", lambda device, dtype: True)
    yield
    compiled._compiled.cache_clear()
    expert_lora.ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, expert_lora.experts_forward)
    dynamo.reset()


def trained(
    coef: float = 0.0, p: float = 0.0, batches: Sequence[tuple[int, tuple[int, ...]]] = BATCHES
) -> tuple[list[float], list[Tensor]]:
    """The losses of a few steps, and the adapter after them.

    A layer is compiled once for an input that needs no gradient, as that of the first one does not, and once
    for one that does. Only the steps on `BATCHES` do both, with queries and keys adapted: in the others every
    input needs one, and the queries alone are adapted.
    """
    model, attention = tiny_olmoe(num_hidden_layers=LAYERS), ATTENTION[:2]
    if batches is not BATCHES:
        model.enable_input_require_grads()
        attention = ATTENTION[:1]
    adapted = AdaptedModel(model, RANK, ALPHA, attention)
    adapted.load(random_adapter(adapted), torch.ones(LAYERS))
    scalars = [lora.s for lora in adapted.loras]
    optimizer = ExpertAdamW(adapted.loras, adapted.attention.values(), 0.01, 0.1, scalars)
    losses = []
    for seed, (k, lengths) in enumerate(batches):
        batch = random_batch(seed, lengths)
        with adapted.training(k, p), torch.random.fork_rng():
            torch.manual_seed(seed)
            loss = training_steps(adapted, optimizer, router_aux_loss_coef=coef)(batch)
        losses.append(loss.item())
    return losses, list(adapted.adapter().tensors().values())


@pytest.mark.slow
def test_compiled_steps_compute_what_eager_steps_do(request: pytest.FixtureRequest) -> None:
    """Then one row with balanced routers, and dropout, whose masks are its own: compiling is slow."""
    plain, one_row, balanced = trained(), trained(batches=ONE_ROW), trained(0.5, batches=ONE_ROW)
    request.getfixturevalue("_front_end")
    assert_close(trained(), plain)
    (reason,) = counters["graph_break"]
    assert "experts_forward" in reason, "the experts are the only break in a layer"
    assert counters["stats"]["unique_graphs"] < 5 * len(BATCHES), "not one for every layer"
    found = trained(0.5, batches=ONE_ROW)
    assert_close(found, balanced)
    moved = (found[1][0] - one_row[1][0]).abs().max()
    assert moved > 1e-3, "balancing has moved the first layer, by more than rounding does"
    dropped = [trained(p=0.2, batches=ONE_ROW)[0] for _ in range(2)]
    assert dropped[0] == dropped[1]
    assert dropped[0] != pytest.approx(one_row[0], rel=1e-3)


def assert_close(found: tuple[list[float], list[Tensor]], wanted: tuple[list[float], list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0)
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tools", [("triton", "cc"), ("triton",), ("cc",), ()])
def test_cuda_compiles_where_triton_and_a_c_compiler_are(
    tools: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiled, "find_spec", lambda name: name in tools or None)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: name if name in tools else None)
    compiled._has_compiler.cache_clear()
    try:
        assert compiled.can_compile("cuda") == (tools == ("triton", "cc"))
        assert not compiled.can_compile("cpu")
    finally:
        compiled._has_compiler.cache_clear()


def test_layers_run_as_they_were_after_the_block() -> None:
    layers = tiny_olmoe().model.layers
    compiled_layers = compiled.CompiledLayers(layers, save_memory=False)
    with compiled_layers.used():
        assert all("forward" in layer.__dict__ for layer in layers)
    assert not any("forward" in layer.__dict__ for layer in layers)
