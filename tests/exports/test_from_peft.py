"""Adapters that PEFT trained, in its fused layout: ours have its logits, and a broken one is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.exports.both_layouts import EXPERTS, LAYOUTS, Export
from tests.tiny_exports import ALPHA, SIZES, K, R, adapt, assert_same_logits, load, logits, our_logits
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from fedflame.errors import UserError
from fedflame.exports import Layout, load_adapter, read_settings
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def train_in_peft(base: Path, folder: Path, seed: int = 0, **settings: object) -> Tensor:
    """The logits of a PEFT adapter with random values, and the folder that PEFT writes."""
    torch.manual_seed(seed)
    settings = {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return logits(model.eval())


def in_ours(base: Path, folder: Path) -> tuple[AdaptedModel, Tensor]:
    settings = read_settings(folder)
    assert settings.base_model == str(base)
    lora = settings.adapter
    adapted = adapt(base, lora.r, lora.lora_alpha, lora.target_modules, lora.use_rslora)
    state = ServerState(load_adapter(folder, adapted, seed=3), {K: torch.ones(2)})
    return adapted, our_logits(adapted, state, K)


FOREIGN: dict[str, tuple[int, dict[str, object]]] = {
    "gate and up share one rank": (5, {"target_parameters": FUSED}),
    "short names": (5, {"target_parameters": ["gate_up_proj", "down_proj"]}),
    "gate and up only": (5, {"target_parameters": FUSED[:1]}),
    "down only": (5, {"target_parameters": FUSED[1:]}),
    "down in one layer": (5, {"target_parameters": ["gate_up_proj", "layers.1.mlp.experts.down_proj"]}),
    "experts only": (5, {"target_modules": [], "target_parameters": FUSED}),
    "attention only": (5, {}),
    "rsLoRA": (5, {"target_parameters": FUSED, "use_rslora": True}),
    "rsLoRA of attention": (5, {"use_rslora": True}),
    "rsLoRA with more rank for down": (
        7,
        {"target_parameters": FUSED, "rank_pattern": {r".*\.down_proj": 7}, "use_rslora": True},
    ),
    "alpha of one": (5, {"target_parameters": FUSED, "alpha_pattern": {r".*\.down_proj": 20, "q_proj": 3}}),
    "more rank for down": (7, {"target_parameters": FUSED, "rank_pattern": {r".*\.down_proj": 7}}),
    "less rank for queries": (5, {"target_parameters": FUSED, "rank_pattern": {"q_proj": 2}}),
    "twice the rank, shared": (
        10,
        {
            "target_parameters": FUSED,
            "rank_pattern": {"gate_up_proj": 10},
            "alpha_pattern": {"gate_up_proj": 14},
        },
    ),
}


@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe"])
@pytest.mark.parametrize("what", list(FOREIGN))
def test_an_adapter_that_peft_trained_gives_its_logits(
    kind: str, what: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    base, (r, settings) = exports[kind].base, FOREIGN[what]
    theirs = train_in_peft(base, tmp_path, **settings)
    adapted, ours = in_ours(base, tmp_path)
    assert adapted.r == r
    assert_same_logits(ours, theirs)
    assert float((logits(load(base)) - ours).abs().max()) > 0.05 * float(ours.abs().max())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mixtral_from_peft(seed: int, exports: dict[str, Export], tmp_path: Path) -> None:
    theirs = train_in_peft(exports["mixtral"].base, tmp_path, seed, target_parameters=FUSED)
    assert_same_logits(in_ours(exports["mixtral"].base, tmp_path)[1], theirs)


def test_an_adapter_that_peft_trained_on_after_ours(exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports["olmoe"]
    model = PeftModel.from_pretrained(load(export.base), export.folders["per-expert"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.1  # gate and up now share every rank
    model.save_pretrained(tmp_path)
    adapted, ours = in_ours(export.base, tmp_path)
    assert (adapted.r, adapted.loras[0].scaling) == (2 * R, ALPHA / R)
    assert_same_logits(ours, logits(model))


def test_what_a_folder_lacks_starts_as_a_new_run(exports: dict[str, Export], tmp_path: Path) -> None:
    train_in_peft(exports["olmoe"].base, tmp_path, r=R, lora_alpha=ALPHA, target_parameters=FUSED[1:])
    adapted = exports["olmoe"].adapted
    got, start = load_adapter(tmp_path, adapted, seed=3).tensors(), adapted.initial_adapter(3).tensors()
    trained = {name for name in got if ".A2" in name or ".B2" in name or "q_proj" in name or "v_proj" in name}
    assert len(trained) == 2 * 2 + 2 * 4
    for name, value in got.items():
        assert torch.equal(value, start[name]) != (name in trained), name


def test_ranks_beyond_those_of_a_product_can_be_trained(exports: dict[str, Export], tmp_path: Path) -> None:
    settings = {"target_parameters": FUSED, "rank_pattern": {r".*\.down_proj": 7}}
    train_in_peft(exports["olmoe"].base, tmp_path, **settings)
    adapted = in_ours(exports["olmoe"].base, tmp_path)[0]
    bank = adapted.adapter().experts
    assert not bank["0.B1"][:, :, 5:].any()
    assert bool((bank["0.A1"].unflatten(1, (2, 7))[:, :, 5:] != 0).all())  # with A = B = 0 no gradient moves


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_tensor(folder: Path, name: str, value: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(f"{EXPERTS}.{name}", None)
    if value is not None:
        tensors[f"{EXPERTS}.{name}"] = value
    save_file(tensors, path)


BROKEN = {
    r"base_layer.lora_A.weight is \(30, 32\); the model needs \(24, 32\)": lambda folder: edit(
        folder, rank_pattern={"down_proj": 5, "gate_up_proj": 4}
    ),
    "lacks .*layers.1.mlp.experts.lora_B.weight": lambda folder: replace_tensor(
        folder, "lora_B.weight", None
    ),
    "has, unlike the model, .*experts.9.lora_A": lambda folder: replace_tensor(
        folder, "9.lora_A.weight", torch.ones(5, 32)
    ),
    r"experts.lora_B.weight is \(6, 5, 32\); the model needs \(32, 30\)": lambda folder: replace_tensor(
        folder, "lora_B.weight", torch.ones(6, 5, 32)
    ),
    r"base_layer.lora_B.weight is \(7,\); the model needs \(40, 30\)": lambda folder: replace_tensor(
        folder, "base_layer.lora_B.weight", torch.ones(7)
    ),
    "experts.lora_A.weight has a value that is not finite": lambda folder: replace_tensor(
        folder, "lora_A.weight", torch.full((30, 20), torch.nan)
    ),
    "truncated or no safetensors": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"),
    "rank_pattern = {'down_proj': 0} in adapter_config.json": lambda folder: edit(
        folder, rank_pattern={"down_proj": 0}
    ),
    "use_dora is not supported": lambda folder: edit(folder, use_dora=True),
    "has, unlike the model, .*base_layer.lora_A.weight": lambda folder: edit(
        folder, target_parameters=["mlp.experts.down_proj"]
    ),
}


@pytest.mark.parametrize("reason", list(BROKEN))
def test_a_broken_fused_adapter_is_one_line(reason: str, exports: dict[str, Export], tmp_path: Path) -> None:
    base = exports["olmoe"].base
    train_in_peft(base, tmp_path, target_parameters=FUSED)
    adapted = adapt(base, 5, 7.0)
    BROKEN[reason](tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        load_adapter(tmp_path, adapted, seed=0)
    assert "\n" not in str(caught.value)


OTHER_SIZES = {
    "intermediate_size": (24, r"experts.*lora_B.weight is \(.*\); the model needs \((48|24), "),
    "num_hidden_layers": (3, r"lacks .*layers\.2\."),
    "num_experts": (5, r"experts.5.*|is \(48, 32\); the model needs \(40, 32\)"),
}


@pytest.mark.parametrize("layout", LAYOUTS["olmoe"])
@pytest.mark.parametrize("size", list(OTHER_SIZES))
def test_an_adapter_of_another_model_is_refused(
    size: str, layout: Layout, exports: dict[str, Export], tmp_path: Path
) -> None:
    value, reason = OTHER_SIZES[size]
    other = OlmoeForCausalLM(OlmoeConfig(**{"intermediate_size": 20, **SIZES, size: value}))
    adapted = AdaptedModel(other, R, ALPHA, ("q_proj", "k_proj", "v_proj", "o_proj"))
    with pytest.raises(UserError, match=reason) as caught:
        load_adapter(exports["olmoe"].folders[layout], adapted, seed=0)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_rank_is_refused(exports: dict[str, Export]) -> None:
    with pytest.raises(UserError, match=r"r = 4; the model is prepared for r = 5"):
        load_adapter(exports["olmoe"].folders["fused"], adapt(exports["olmoe"].base, 5), seed=0)
