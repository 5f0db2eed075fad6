"""Adapter folders that are read back: exactly what was exported, or one line that says what is wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_exports import TIERS, adapt, our_logits, run_config, with_merged

from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import export_adapter, load_adapter, load_rescalers, read_settings
from fedflame.messages import NOTHING
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState


def test_round_trip_is_exact(base: Path, adapted: AdaptedModel, state: ServerState, exported: Path) -> None:
    settings = read_settings(exported)
    assert settings.base_model == str(base)
    assert settings.adapter == run_config(base).adapter
    back = load_adapter(exported, adapted, seed=0)
    assert back.tensors().keys() == state.adapter.tensors().keys()
    for name, value in state.adapter.tensors().items():
        assert torch.equal(back.tensors()[name], value), name
    rescalers = load_rescalers(exported, adapted)
    assert {k: s.tolist() for k, s in rescalers.items()} == {3: [1, 1], 2: [1.25, 0.75], 1: [1.5, 2.25]}


def test_merged_factors_come_back_as_further_ranks_at_the_same_scaling(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    state = with_merged(state, 6)
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, tmp_path / "adapter")
    settings = read_settings(tmp_path / "adapter").adapter
    assert (settings.r, settings.lora_alpha) == (4 + 6, 6.0 * 10 / 4)
    wide = adapt(base, settings.r, settings.lora_alpha)
    back = ServerState(
        load_adapter(tmp_path / "adapter", wide, seed=0), load_rescalers(tmp_path / "adapter", wide)
    )
    for k in TIERS:
        ours = our_logits(adapted, state, k)
        torch.testing.assert_close(
            our_logits(wide, back, k), ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max())
        )
        assert float((our_logits(adapted, replace(state, merged=NOTHING), k) - ours).abs().max()) > 0.1


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers.0.mlp.experts.5."
    for name, value in changes.items():
        tensors.pop(f"{prefix}{name}.lora_A.weight", None)
        if value is not None:
            tensors[f"{prefix}{name}.lora_A.weight"] = value
    save_file(tensors, path)


BROKEN = {
    "adapter_config.json: No such file": lambda folder: (folder / "adapter_config.json").unlink(),
    "not JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "holds a list; it must hold a JSON object": lambda folder: (folder / "adapter_config.json").write_text(
        "[]"
    ),
    "no LoRA adapter": lambda folder: edit_config(folder, peft_type="IA3"),
    "unlike the model, .*experts.0.down_proj": lambda folder: edit_config(folder, target_modules=["q_proj"]),
    "target_modules = '.*proj' in adapter_config.json: Input should be a valid list": lambda folder: (
        edit_config(folder, target_modules=".*proj")
    ),
    "its scale is 3; the model has 1.5": lambda folder: edit_config(folder, use_rslora=True),
    "LoRA with init_lora_weights = 'pissa' is not": lambda folder: edit_config(
        folder, init_lora_weights="pissa"
    ),
    "rank_pattern or alpha_pattern is not supported in the per-expert layout": lambda folder: edit_config(
        folder, rank_pattern={"q_proj": 2}
    ),
    "r = 'four' in adapter_config.json: Input should be a valid integer": lambda folder: edit_config(
        folder, r="four"
    ),
    "r = 8; the model is prepared for r = 4": lambda folder: edit_config(folder, r=8),
    "its scale is 4; the model has 1.5": lambda folder: edit_config(folder, lora_alpha=16),
    "adapter_model.safetensors: No such file": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "truncated or no safetensors": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"),
    "lacks .*experts.5.up_proj.lora_A": lambda folder: edit_tensors(folder, up_proj=None),
    "unlike the model, .*experts.5.side_proj": lambda folder: edit_tensors(
        folder, side_proj=torch.ones(4, 32)
    ),
    r"experts.5.up_proj.lora_A.weight is \(32, 4\); .* \(4, 32\)": lambda folder: edit_tensors(
        folder, up_proj=torch.ones(32, 4)
    ),
}


@pytest.mark.parametrize("reason", list(BROKEN))
def test_a_broken_or_foreign_adapter_is_one_line(reason: str, exported: Path, adapted: AdaptedModel) -> None:
    BROKEN[reason](exported)
    with pytest.raises(UserError, match=reason) as caught:
        load_adapter(exported, adapted, seed=0)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_other_attention_projections_is_refused(base: Path, exported: Path) -> None:
    with pytest.raises(UserError, match=r"has, unlike the model, .*layers\.0\.self_attn\.k_proj"):
        load_adapter(exported, adapt(base, targets=["q_proj"]), seed=0)


@pytest.mark.parametrize(
    "tensors", [{"k2": torch.ones(3)}, {"k2": torch.tensor([1.0, torch.nan])}, {"two": torch.ones(2)}]
)
def test_rescalers_that_do_not_fit_are_refused(
    tensors: dict[str, torch.Tensor], exported: Path, adapted: AdaptedModel
) -> None:
    save_file(tensors, exported / "rescalers.safetensors")
    with pytest.raises(UserError, match="no finite s for each of 2 MoE layers"):
        load_rescalers(exported, adapted)
    (exported / "rescalers.safetensors").unlink()
    assert load_rescalers(exported, adapted) == {}


def test_a_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory; no adapter folder"):
        read_settings(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="No such file or directory; no adapter folder"):
        read_settings(tmp_path)
