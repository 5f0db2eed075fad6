"""A GGUF LoRA, read back with gguf's own reader and rebuilt in numpy."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.families import tiny
from tests.tiny_exports import ALPHA, MODELS, K, R, adapt, random_state, run_config, save_base
from tests.tiny_models import random_adapter

from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import export_gguf
from fedflame.exports.gguf_file import ARCHITECTURES
from fedflame.messages import Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

Products = dict[str, NDArray[np.float32]]
RUN = trained_run(run_config(Path("base")), 1)


def read(folder: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(folder / "adapter.gguf")


def products(file: gguf.GGUFReader) -> Products:
    """Weight -> (alpha / rank) B A, as llama.cpp computes it; [E,out,in] for experts."""
    tensors = {tensor.name: tensor.data for tensor in file.tensors}
    alpha = np.float32(file.fields["adapter.lora.alpha"].contents())
    names = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert {f"{name}.lora_{letter}" for name in names for letter in "ab"} == tensors.keys()
    found = {}
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.dtype == b.dtype == np.float32 and a.shape[-2] == b.shape[-1]
        found[name] = alpha / np.float32(a.shape[-2]) * (b @ a)
    return found


def expert_products(adapter: Adapter, layers: int) -> Products:
    """The same of our banks, by expert and projection."""
    found: Products = {}
    for layer in range(layers):
        a1, b1, a2, b2 = (adapter.experts[f"{layer}.{bank}"].numpy() for bank in ("A1", "B1", "A2", "B2"))
        r, width = a2.shape[1:]
        scale = np.float32(ALPHA) / np.float32(R)
        parts = {"gate": (b1[:, :width], a1[:, :r]), "up": (b1[:, width:], a1[:, r:]), "down": (b2, a2)}
        for part, (b, a) in parts.items():
            found[f"blk.{layer}.ffn_{part}_exps.weight"] = scale * np.stack(
                [b[expert] @ a[expert] for expert in range(len(a))]
            )
    return found


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> AdaptedModel:
    return adapt(save_base("olmoe", tmp_path_factory.mktemp("models") / "olmoe"))


@pytest.mark.parametrize("kind", list(MODELS))
def test_every_product_is_the_runs(kind: str, tmp_path: Path) -> None:
    adapted = adapt(save_base(kind, tmp_path / "base"))
    state = random_state(adapted)
    export_gguf(state, RUN, MODELS[kind](), K, tmp_path / "gguf")
    file = read(tmp_path / "gguf")
    facts = {name: file.fields[name].contents() for name in ("general.type", "adapter.type")}
    assert facts == {"general.type": "adapter", "adapter.type": "lora"}
    assert file.fields["general.architecture"].contents() == ARCHITECTURES[kind]
    got, wanted = products(file), expert_products(state.adapter, 2)
    assert got.keys() >= wanted.keys()
    for name, product in wanted.items():
        np.testing.assert_allclose(got.pop(name), product, rtol=1e-6, atol=1e-7, err_msg=name)
    assert len(got) == 2 * 4
    values = {name: value.numpy() for name, value in state.adapter.attention.items()}
    for part, projection in zip("q k v output".split(), "q k v o".split(), strict=True):
        module = f"model.layers.1.self_attn.{projection}_proj"
        product = np.float32(ALPHA / R) * (values[f"{module}.B"] @ values[f"{module}.A"])
        if kind == "mixtral" and part in "qk":
            product = paired(product, heads=4 if part == "q" else 2)
        name = f"blk.1.attn_{part}.weight"
        np.testing.assert_allclose(got[name], product, rtol=1e-6, atol=1e-7, err_msg=name)


def paired(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The rows of each head with those beside each other that the rotary embedding turns together."""
    size = len(rows) // heads
    order = [
        head * size + half * (size // 2) + pair
        for head in range(heads)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_llama_cpp_knows_every_weight_of_the_families_that_are_written(family: str, tmp_path: Path) -> None:
    targets = [] if "q_lora_rank" in tiny(family).config.to_dict() else ["q_proj", "k_proj", "v_proj"]
    adapted = AdaptedModel(tiny(family), R, ALPHA, [*targets, "o_proj"])
    state = ServerState(random_adapter(adapted), {})
    export_gguf(state, RUN, tiny(family), 3, tmp_path / "gguf")
    [architecture] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family]]
    known = {
        gguf.TENSOR_NAMES[part].format(bid=layer)
        for part in gguf.MODEL_TENSORS[architecture]
        for layer in range(2)
    }
    got = products(read(tmp_path / "gguf"))
    assert {name.removesuffix(".weight") for name in got} <= known
    for name, product in expert_products(state.adapter, 2).items():
        np.testing.assert_allclose(got[name], product, rtol=1e-6, atol=1e-7, err_msg=name)


def test_factors_that_the_method_merged_are_further_ranks(olmoe: AdaptedModel, tmp_path: Path) -> None:
    state = random_state(olmoe)
    twice = replace(state, merged=state.adapter)
    export_gguf(twice, RUN, MODELS["olmoe"](), K, tmp_path / "gguf")
    got = products(read(tmp_path / "gguf"))
    for name, product in expert_products(state.adapter, 2).items():
        np.testing.assert_allclose(got[name], 2 * product, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_adapter_of_a_tier_is_written_for_its_k(olmoe: AdaptedModel, tmp_path: Path) -> None:
    state = random_state(olmoe)
    own = state.adapter.combine(state.adapter, lambda a, _: 3 * a)
    state = ServerState(state.adapter, {2: torch.ones(2)}, tier_adapters={2: own})
    advice = export_gguf(state, RUN, MODELS["olmoe"](), 2, tmp_path / "gguf")
    command = "`llama-cli -m BASE.gguf --lora adapter.gguf --override-kv olmoe.expert_used_count=int:2`"
    assert command in advice and command in (tmp_path / "gguf" / "README.md").read_text()
    got = products(read(tmp_path / "gguf"))
    name = "blk.1.ffn_down_exps.weight"
    np.testing.assert_allclose(got[name], expert_products(own, 2)[name], rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "gguf" / "fedflame.json").read_text())["gguf_at"] == 2


def test_a_rescaler_is_refused_with_what_to_do(olmoe: AdaptedModel, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"at k = 2: its rescaler is 0\.750 to 1\.250, and llama\.cpp has no pl"
    ):
        export_gguf(random_state(olmoe), RUN, MODELS["olmoe"](), 2, tmp_path / "gguf")
    with pytest.raises(UserError, match="at k = 4: no client had this tier; allowed are 3, 2, 1"):
        export_gguf(random_state(olmoe), RUN, MODELS["olmoe"](), 4, tmp_path / "gguf")
    assert not list(tmp_path.iterdir())


def test_a_family_that_the_converter_does_not_take_is_refused(olmoe: AdaptedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not for granitemoe models; it is written for afmoe, .*--merge"):
        export_gguf(random_state(olmoe), RUN, tiny("granitemoe"), 3, tmp_path / "gguf")


def test_a_projection_that_the_converter_takes_apart_is_refused(tmp_path: Path) -> None:
    adapted = AdaptedModel(tiny("deepseek_v3"), R, ALPHA, ["kv_b_proj"])
    state = ServerState(adapted.initial_adapter(0), {})
    with pytest.raises(UserError, match=r"LoRA on model\.layers\.0\.self_attn\.kv_b_proj is not written"):
        export_gguf(state, RUN, tiny("deepseek_v3"), 3, tmp_path / "gguf")


def test_without_gguf_the_line_says_what_to_install(
    olmoe: AdaptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"--gguf needs the package gguf: pip install 'fedflame\[gguf\]'"):
        export_gguf(random_state(olmoe), RUN, MODELS["olmoe"](), K, tmp_path / "gguf")
