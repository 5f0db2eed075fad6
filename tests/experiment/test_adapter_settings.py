"""The settings of the adapter, from the configuration to the run folder, the export and a resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.families import tiny
from tests.tiny_models import VOCABULARY, character_tokenizer
from tests.tiny_runs import ONE_ROUND, arguments, invoke, state_bytes, tiny_run

from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.model_shape import read_model_shape

SMALLER_K = "clients.active_experts=3,2,1"
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def family_folder(family: str, folder: Path) -> Path:
    model = tiny(family, vocab_size=VOCABULARY, max_position_embeddings=256, tie_word_embeddings=False)
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("glm4_moe_lite", LATENT),
        ("kimi_linear", ["q_proj", "k_proj", "v_proj", "o_proj", *LATENT[:-1]]),
        ("lfm2_moe", ["q_proj", "k_proj", "v_proj", "self_attn.out_proj"]),
        ("qwen3_next", ["in_proj_qkvz", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]),
    ],
)
def test_a_run_of_another_attention_says_what_carries_lora(
    family: str, names: list[str], tmp_path: Path
) -> None:
    model, run = family_folder(family, tmp_path / "model"), tmp_path / "run"
    tiny_run(model, run, SMALLER_K, ONE_ROUND)
    assert json.loads((run / "config.json").read_text())["adapter"]["target_modules"] == names
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"][: len(names)] == names
    assert f"on every expert and on {','.join(names)}" in (run / "adapter" / "README.md").read_text()
    size = adapter_parameters(read_model_shape(model), 3, names)
    planned = json.loads((run / "plan.json").read_text())
    assert {tier["bytes_down"] for tier in planned["tiers"]} == {size.bytes_down}
    for to, *options in (("merged", "--merge"), ("adapter",)):
        checked = invoke("export", run, "--to", tmp_path / to, *options, "--check")
        assert checked.exit_code == 0, checked.output


@pytest.mark.slow
def test_auto_and_the_four_names_give_the_same_bytes_and_go_on_from_each_other(
    tiny_folder: Path, tmp_path: Path
) -> None:
    four = "adapter.target_modules=q_proj,k_proj,v_proj,o_proj"
    tiny_run(tiny_folder, tmp_path / "a", ONE_ROUND)
    tiny_run(tiny_folder, tmp_path / "b", ONE_ROUND, four)
    assert state_bytes(tmp_path / "a") == state_bytes(tmp_path / "b")
    one = json.loads((tmp_path / "b" / "config.json").read_text())
    other = json.loads((tmp_path / "a" / "config.json").read_text())
    assert one["adapter"] == other["adapter"]
    resumed = invoke(*arguments(tiny_folder, tmp_path / "b", ONE_ROUND), "--resume")
    assert resumed.exit_code == 0, resumed.output
    refused = invoke(
        *arguments(tiny_folder, tmp_path / "b", ONE_ROUND, "adapter.target_modules=q_proj"), "--resume"
    )
    assert "adapter.target_modules differs" in refused.output


@pytest.mark.parametrize("name", ["all-linear", "lm_head", "embed_tokens", "gate", "q_proj,v_porj"])
def test_a_name_that_carries_no_lora_is_refused_at_once(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    run = arguments(tiny_folder, tmp_path / "run", f"adapter.target_modules={name}")
    for command in (run, ["plan", *run[1:3], *run[5:]]):
        result = invoke(*command)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "'auto', or attention projections of olmoe: q_proj, k_proj, v_proj, o_proj" in result.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_other_habits_of_the_adapter_reach_the_run_and_its_export(
    tiny_folder: Path, tmp_path: Path
) -> None:
    habits = ("adapter.use_rslora=true", "adapter.lora_dropout=0.1", "training.router_aux_loss_coef=0.05")
    given = {"plain": (), **{habit: (habit,) for habit in habits}, "again": habits[1:2]}
    runs = {name: tmp_path / name for name in given}
    for name, settings in given.items():
        tiny_run(tiny_folder, runs[name], ONE_ROUND, *settings)
    states = [state_bytes(run) for run in runs.values()]
    assert states[2] == states[4], "the same masks in the same run"
    assert len(set(states)) == 4
    for layout in ("per-expert", "fused"):
        folder = tmp_path / layout
        made = invoke("export", runs[habits[0]], "--to", folder, "--layout", layout, "--check")
        assert made.exit_code == 0, made.output
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert (settings["r"], settings["lora_alpha"]) == (3, pytest.approx(16 * 3**0.5))
        assert "r = 3, lora_alpha = 16, use_rslora on every expert" in (folder / "README.md").read_text()
    start = f"model.adapter_name_or_path={tmp_path / 'fused'}"
    tiny_run(tiny_folder, tmp_path / "on", ONE_ROUND, start, habits[0])
    other = invoke(*arguments(tiny_folder, tmp_path / "off", ONE_ROUND, start))
    assert other.exit_code == 2
    assert "adapter.r = 3, adapter.lora_alpha = 16: the adapter in" in other.stderr
    assert "has r = 3, lora_alpha = 27.7128;" in other.stderr
