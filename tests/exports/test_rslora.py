"""rsLoRA (arXiv 2312.03732): one scale, alpha / sqrt(r), in training, merging and every export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_exports import (
    ALPHA,
    ATTENTION,
    TOKENS,
    K,
    R,
    adapt,
    assert_same_logits,
    load,
    logits,
    our_logits,
    peft_logits,
    random_state,
    run_config,
)
from transformers import AutoModelForCausalLM

from fedflame.config.sections import AdapterConfig
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import export_adapter, load_adapter, read_settings
from fedflame.exports.gguf_file import export_gguf
from fedflame.exports.layouts import Layout
from fedflame.exports.merged_folder import merge_checkpoint
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

SCALE = 3.0
"""Of alpha 6 and rank 4; that of plain LoRA is 1.5."""


@pytest.fixture(scope="module")
def adapted(base: Path) -> AdaptedModel:
    return adapt(base, use_rslora=True)


@pytest.fixture(scope="module")
def state(adapted: AdaptedModel) -> ServerState:
    """An adapter, and factors of another rank that a method merged into the base."""
    state = random_state(adapted)
    return replace(state, merged=random_state(adapted).adapter.with_rank(3), rescalers={K: torch.ones(2)})


def test_the_scale_by_hand() -> None:
    rs, plain = (AdapterConfig(r=4, lora_alpha=6.0, use_rslora=use) for use in (True, False))
    assert (plain.scale, plain.plain_alpha(4), plain.plain_alpha(6)) == (1.5, 6.0, 9.0)
    assert (rs.scale, rs.plain_alpha(4), rs.plain_alpha(6)) == (SCALE, 12.0, 18.0)
    assert AdapterConfig(r=9, lora_alpha=6.0, use_rslora=True).scale == 2.0
    assert (rs.in_words, plain.in_words) == (
        "r = 4, lora_alpha = 6, use_rslora",
        "r = 4, lora_alpha = 6",
    )


def test_the_model_has_the_scale_in_experts_attention_and_merged_factors(
    base: Path, adapted: AdaptedModel, state: ServerState
) -> None:
    twice = adapt(base, alpha=SCALE * R)
    for rank in (R, 2):  # a client of a smaller rank has the scale of the model's
        cut = replace(state, adapter=state.adapter.with_rank(rank))
        assert torch.equal(our_logits(adapted, cut, K), our_logits(twice, cut, K))
    assert not torch.allclose(our_logits(adapted, state, K), our_logits(adapt(base), state, K), atol=1e-2)


def test_attention_is_scaled_as_peft_scales_it(base: Path, adapted: AdaptedModel, state: ServerState) -> None:
    settings = LoraConfig(r=R, lora_alpha=int(ALPHA), use_rslora=True, target_modules=list(ATTENTION))
    stock = get_peft_model(load(base), settings)
    for name, value in state.adapter.attention.items():
        module, _, half = name.rpartition(".")
        stock.get_submodule(f"base_model.model.{module}.lora_{half}.default").weight.data = value.clone()
    experts = {name: torch.zeros_like(value) for name, value in state.adapter.experts.items()}
    only = ServerState(replace(state.adapter, experts=experts), {K: torch.ones(2)})
    assert_same_logits(logits(stock.eval()), our_logits(adapted, only, K))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_peft_computes_the_same_from_both_layouts(
    layout: Layout, base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    run = trained_run(run_config(base, use_rslora=True), 1)
    export_adapter(state, run, adapted.model, tmp_path / "a", layout=layout)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["r"] == R + 3
    assert settings["lora_alpha"] == SCALE * (R + 3)
    assert "use_rslora" not in settings
    [(_, got)] = peft_logits([(base, tmp_path / "a")])
    assert_same_logits(got, our_logits(adapted, state, K))


def test_peft_would_scale_gate_and_up_otherwise_if_the_folder_said_use_rslora(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    alone = replace(state, merged=type(state.adapter)({}, {}))
    run = trained_run(run_config(base, use_rslora=True), 1)
    export_adapter(alone, run, adapted.model, tmp_path / "a", layout="per-expert")
    config = tmp_path / "a" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"lora_alpha": ALPHA, "use_rslora": True}
    config.write_text(json.dumps(values))
    [(_, got)] = peft_logits([(base, tmp_path / "a")])
    ours = our_logits(adapted, alone, K)
    assert (got - ours).norm() > 0.01 * ours.norm()


def test_a_merged_checkpoint_has_the_scale(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    merge_checkpoint(state, trained_run(run_config(base, use_rslora=True), 1), K, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert_same_logits(model(TOKENS).logits.detach(), our_logits(adapted, state, K))


def test_the_alpha_of_a_gguf_file_is_divided_by_the_rank(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    export_gguf(state, trained_run(run_config(base, use_rslora=True), 1), adapted.model, K, tmp_path / "g")
    reader = gguf.GGUFReader(tmp_path / "g" / "adapter.gguf")
    field = reader.fields["adapter.lora.alpha"]
    assert float(field.parts[field.data[0]][0]) / (R + 3) == SCALE


def test_our_folder_comes_back_bit_for_bit_also_where_the_root_rounds(base: Path, tmp_path: Path) -> None:
    rounded = [r for r in range(2, 12) if AdapterConfig(r=r, lora_alpha=6.7, use_rslora=True).scale
               != AdapterConfig(r=r, lora_alpha=6.7, use_rslora=True).plain_alpha(r) / r]  # fmt: skip
    assert rounded
    r = rounded[0]
    adapted = adapt(base, r, 6.7, use_rslora=True)
    state = random_state(adapted)
    config = run_config(base, use_rslora=True)
    lora = config.adapter.model_copy(update={"r": r, "lora_alpha": 6.7})
    run = trained_run(config.model_copy(update={"adapter": lora}), 1)
    export_adapter(state, run, adapted.model, tmp_path / "a")
    got = load_adapter(tmp_path / "a", adapted, seed=0).tensors()
    assert all(torch.equal(got[name], value) for name, value in state.adapter.tensors().items())
    assert read_settings(tmp_path / "a").adapter.use_rslora is False
