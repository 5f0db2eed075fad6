"""Exported adapters: PEFT has our logits with them, and what their folder and card say."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tests.tiny_exports import MODELS, SIZES, K, our_logits, peft_logits, run_config, with_merged, with_tiers
from transformers import OlmoeConfig, OlmoeForCausalLM

from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import CardFacts, export_adapter, load_adapter, load_tier_adapters
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState


@pytest.mark.parametrize("merged_rank", [0, 6])
def test_peft_in_a_fresh_process_gives_our_logits(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path, merged_rank: int
) -> None:
    state, exported = with_merged(state, merged_rank) if merged_rank else state, tmp_path / "adapter"
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, exported)
    [(plain, peft)] = peft_logits([(base, exported)])
    ours = our_logits(adapted, state, K)
    torch.testing.assert_close(peft, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))
    assert float((plain - ours).abs().max()) > 0.1 * float(ours.abs().max())


def test_the_names_and_values_of_one_expert(exported: Path, state: ServerState) -> None:
    tensors = load_file(exported / "adapter_model.safetensors")
    assert len(tensors) == 2 * (6 * 3 * 2 + 4 * 2)
    prefix, bank = "base_model.model.model.layers.1.mlp.experts.4.", state.adapter.experts
    expected = {
        "gate_proj.lora_A": bank["1.A1"][4, :4],
        "up_proj.lora_A": bank["1.A1"][4, 4:],
        "gate_proj.lora_B": bank["1.B1"][4, :20],
        "up_proj.lora_B": bank["1.B1"][4, 20:],
        "down_proj.lora_A": bank["1.A2"][4],
        "down_proj.lora_B": bank["1.B2"][4],
    }
    for name, value in expected.items():
        assert torch.equal(tensors[f"{prefix}{name}.weight"], value), name
    attention = tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    assert torch.equal(attention, state.adapter.attention["model.layers.0.self_attn.k_proj.B"])


def test_a_model_without_weights_exports_the_same_bytes(
    base: Path, adapted: AdaptedModel, state: ServerState, exported: Path, tmp_path: Path
) -> None:
    with torch.device("meta"):
        hollow = MODELS["olmoe"]()
    export_adapter(state, trained_run(run_config(base), 4), hollow, tmp_path / "hollow")
    files = sorted(path.name for path in exported.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "hollow").iterdir())
    for name in files:
        assert (exported / name).read_bytes() == (tmp_path / "hollow" / name).read_bytes(), name


def test_what_the_folder_says(base: Path, exported: Path) -> None:
    facts = json.loads((exported / "fedflame.json").read_text())
    assert facts["base_model"] == str(base)
    assert facts["num_experts_per_tok"] == K
    assert facts["tiers"] == [3, 2, 1]
    assert facts["rounds"] == 4
    assert facts["strategy"]["name"] == "flame"
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert settings["target_modules"] == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 6.0, "CAUSAL_LM")
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "4 federated rounds" in card
    assert "| 1 | 1.8750 | 1.5000 to 2.2500 |" in card


def test_whoever_can_read_other_new_files_can_read_the_weights(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    """safetensors writes files for their owner alone; a server often runs as another user."""
    before = os.umask(0o027)
    try:
        export_adapter(
            with_tiers(state), trained_run(run_config(base), 4), adapted.model, tmp_path / "adapter"
        )
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert len({path for path in files if path.suffix == ".safetensors"}) > 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_the_card_names_a_base_of_the_hub(adapted: AdaptedModel, state: ServerState, tmp_path: Path) -> None:
    export_adapter(state, trained_run(run_config(Path("allenai/OLMoE")), 1), adapted.model, tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text().startswith("---\nbase_model: allenai/OLMoE\n")
    assert "\nbase_model_relation: adapter\n" in (tmp_path / "a" / "README.md").read_text()


def test_the_card_names_a_data_set_of_the_hub_and_no_value_that_is_not_finite(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    facts = CardFacts("owner/rows", {3: {"loss": float("nan"), "exact_match": 0.25}})
    run = replace(trained_run(run_config(base), 1), base_model="olmoe-tiny", card=facts)
    export_adapter(state, run, adapted.model, tmp_path / "a")
    data = ModelCard.load(tmp_path / "a" / "README.md").data
    assert data.datasets == "owner/rows" and data.base_model is None
    [result] = data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == (
        "owner/rows",
        "exact_match",
        0.25,
    )


def test_adapters_of_one_k_are_adapter_folders_below(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    state, folder = with_tiers(state), tmp_path / "adapter"
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, folder)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"k2", "k1"}
    assert "The folders `k2`, `k1` below" in (folder / "README.md").read_text()
    back = load_tier_adapters(folder, adapted, seed=0)
    assert back.keys() == {2, 1}
    for k, adapter in {3: load_adapter(folder, adapted, seed=0), **back}.items():
        for name, value in state.adapter_at(k).tensors().items():
            assert torch.equal(adapter.tensors()[name], value), (k, name)
    for k, (_, peft) in zip((2, 1), peft_logits([(base, folder / "k2"), (base, folder / "k1")]), strict=True):
        ours = our_logits(adapted, replace(state, adapter=state.adapter_at(k)), K)
        torch.testing.assert_close(peft, ours, rtol=1e-5, atol=1e-5 * float(ours.abs().max()))


def test_a_base_that_is_not_the_runs_is_refused(state: ServerState, tmp_path: Path) -> None:
    with torch.device("meta"):
        other = OlmoeForCausalLM(OlmoeConfig(intermediate_size=24, **SIZES))
    with pytest.raises(
        UserError, match=r"not the run's: 0\.A2 is \(6, 4, 20\); the model needs \(6, 4, 24\)"
    ):
        export_adapter(state, trained_run(run_config(tmp_path), 1), other, tmp_path / "adapter")
    with torch.device("meta"):
        other = OlmoeForCausalLM(OlmoeConfig(intermediate_size=20, **{**SIZES, "num_key_value_heads": 4}))
    with pytest.raises(UserError, match=r"self_attn\.k_proj\.B is \(16, 4\); the model needs \(32, 4\)"):
        export_adapter(state, trained_run(run_config(tmp_path), 1), other, tmp_path / "adapter")
