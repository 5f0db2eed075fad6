"""Both of PEFT's layouts of expert LoRA, written for PEFT on four families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.exports.both_layouts import EXPERTS, LAYOUTS, Export
from tests.families import tiny as tiny_family
from tests.same_bits import assert_same_adapter
from tests.tiny_exports import MODELS, K, R, assert_same_logits, load, our_logits, peft_logits, run_config
from torch import Tensor

from fedflame.config.load import load_config
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import (
    Layout,
    NoPeftLayoutError,
    export_adapter,
    load_adapter,
    load_rescalers,
    read_settings,
)
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState

CASES = [(kind, layout) for kind, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def in_peft(
    exports: dict[str, Export], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    jobs = [(exports[kind].base, exports[kind].folders[layout]) for kind, layout in CASES]
    return dict(zip(CASES, peft_logits(jobs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_peft_in_a_fresh_process_gives_our_logits(
    kind: str,
    layout: Layout,
    exports: dict[str, Export],
    in_peft: dict[tuple[str, str], tuple[Tensor, Tensor]],
) -> None:
    plain, peft = in_peft[kind, layout]
    ours = our_logits(exports[kind].adapted, exports[kind].state, K)
    assert_same_logits(peft, ours)
    assert float((plain - ours).abs().max()) > 0.1 * float(ours.abs().max())


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_import_of_an_export_has_the_same_bits(kind: str, layout: Layout, exports: dict[str, Export]) -> None:
    export, folder = exports[kind], exports[kind].folders[layout]
    assert read_settings(folder).adapter == run_config(export.base).adapter
    assert_same_adapter(export.state.adapter, load_adapter(folder, export.adapted, seed=0))
    assert {k: s.tolist() for k, s in load_rescalers(folder, export.adapted).items()} == {
        k: s.tolist() for k, s in export.state.rescalers.items()
    }


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_the_default_is_per_expert_where_peft_reads_it(
    kind: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    export = exports[kind]
    with torch.device("meta"):
        hollow = MODELS[kind]()
    written = export_adapter(export.state, trained_run(run_config(export.base), 1), hollow, tmp_path / "a")
    assert written == LAYOUTS[kind][0]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (export.folders[written] / name).read_bytes()


def test_a_layout_that_peft_does_not_read_is_refused(exports: dict[str, Export], tmp_path: Path) -> None:
    export = exports["qwen2_moe"]
    with pytest.raises(
        NoPeftLayoutError, match="no per-expert adapter for qwen2_moe models; use --layout fused"
    ):
        export_adapter(
            export.state,
            trained_run(run_config(export.base), 1),
            export.adapted.model,
            tmp_path / "a",
            layout="per-expert",
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family, reason",
    [
        ("gpt_oss", "transposed weights and interleaved gate and up rows"),
        ("aria_text", "transposed weights"),
        ("nemotron_h", "no gate"),
    ],
)
@pytest.mark.parametrize("layout", [None, "per-expert", "fused"])
def test_experts_that_are_stored_another_way_have_no_adapter_folder(
    family: str, reason: str, layout: Layout | None, tmp_path: Path
) -> None:
    adapted = AdaptedModel(tiny_family(family), 4, 8.0, [])
    state = ServerState(adapted.initial_adapter(0), {1: torch.ones(len(adapted.layers))})
    config = load_config(None, ["adapter.r=4", "adapter.lora_alpha=8", "adapter.target_modules="])
    with pytest.raises(NoPeftLayoutError, match=f"which has {reason}; use --merge"):
        export_adapter(state, trained_run(config, 1), adapted.model, tmp_path / "a", layout=layout)
    with pytest.raises(NoPeftLayoutError, match=f"which has {reason}; use --merge"):
        load_adapter(tmp_path / "a", adapted, seed=0)
    assert not list(tmp_path.iterdir())


def test_the_names_and_values_of_one_fused_expert(exports: dict[str, Export]) -> None:
    export = exports["olmoe"]
    tensors, bank = (
        load_file(export.folders["fused"] / "adapter_model.safetensors"),
        export.state.adapter.experts,
    )
    assert len(tensors) == 2 * (2 * 2 + 4 * 2)
    e, width = 4, 20
    a = tensors[f"{EXPERTS}.base_layer.lora_A.weight"]
    assert torch.equal(a[e * 2 * R : (e + 1) * 2 * R], bank["1.A1"][e])
    b = tensors[f"{EXPERTS}.base_layer.lora_B.weight"][:, e::6]
    assert torch.equal(b[:width, :R], bank["1.B1"][e, :width])
    assert torch.equal(b[width:, R:], bank["1.B1"][e, width:])
    assert not b[:width, R:].any() and not b[width:, :R].any()
    assert torch.equal(tensors[f"{EXPERTS}.lora_A.weight"][e * R : (e + 1) * R], bank["1.A2"][e])
    assert torch.equal(tensors[f"{EXPERTS}.lora_B.weight"][:, e::6], bank["1.B2"][e])


def test_the_hubs_names_of_a_mixtral_expert(exports: dict[str, Export]) -> None:
    export = exports["mixtral"]
    tensors = load_file(export.folders["per-expert"] / "adapter_model.safetensors")
    prefix, bank = "base_model.model.model.layers.1.block_sparse_moe.experts.4.", export.state.adapter.experts
    assert torch.equal(tensors[f"{prefix}w1.lora_A.weight"], bank["1.A1"][4, :R])
    assert torch.equal(tensors[f"{prefix}w3.lora_B.weight"], bank["1.B1"][4, 20:])
    assert torch.equal(tensors[f"{prefix}w2.lora_B.weight"], bank["1.B2"][4])


@pytest.mark.parametrize("kind", [kind for kind, layouts in LAYOUTS.items() if "per-expert" in layouts])
def test_peft_saves_our_per_expert_adapter_as_our_fused_one(
    kind: str, exports: dict[str, Export], tmp_path: Path
) -> None:
    export = exports[kind]
    PeftModel.from_pretrained(load(export.base), export.folders["per-expert"]).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    ours = load_file(export.folders["fused"] / "adapter_model.safetensors")
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in saved)
    settings, written = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, export.folders["fused"])
    )
    assert all(settings[key] == written[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"))
    assert read_settings(tmp_path).adapter.r == R
    assert_same_adapter(export.state.adapter, load_adapter(tmp_path, export.adapted, seed=0))


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_the_tokens_reach_every_expert_of_every_layer(kind: str, exports: dict[str, Export]) -> None:
    adapted, chosen = exports[kind].adapted, []
    for layer in adapted.layers:
        layer.router.register_forward_hook(
            lambda _, __, output: chosen.append(set(output[2].flatten().tolist()))
        )
    our_logits(adapted, exports[kind].state, K)
    assert chosen == [set(range(6))] * 2
