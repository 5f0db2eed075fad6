"""Runs that go on from an adapter folder, and the folders that runs leave, through the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.altered_answers import interrupt
from tests.held_out_losses import WITHOUT_ADAPTER, logged_losses, losses
from tests.tiny_models import ATTENTION, EXPERTS, HIDDEN, PAD, TOP_K, VOCABULARY, WIDTH, character_tokenizer
from tests.tiny_runs import (
    ONE_ROUND,
    adapter_bytes,
    checkpoint_bytes,
    invoke,
    tiny_config,
    tiny_run,
)
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from fedflame.base.adapted import load_adapted_model
from fedflame.errors import UserError
from fedflame.experiment.prepare import with_target_modules
from fedflame.exports import load_rescalers
from fedflame.server.checkpoint import read_checkpoint

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def first(undisturbed: Callable[..., Path]) -> Path:
    return undisturbed("training.learning_rate=0.02", "server.num_server_rounds=2")


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen"
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, moe_intermediate_size=WIDTH, intermediate_size=28,
        shared_expert_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=EXPERTS, num_experts_per_tok=TOP_K, max_position_embeddings=512, pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def going_on_from(folder: Path) -> str:
    return f"model.adapter_name_or_path={folder}"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_a_run_starts_at_the_loss_of_its_adapter(
    layout: str, first: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    result = invoke("export", first, "--to", tmp_path / "a", "--layout", layout)
    assert result.exit_code == 0, result.stderr
    assert "".join(result.stdout.split()) == f"written:{tmp_path / 'a'}"
    shown = tiny_run(tiny_folder, tmp_path / "run", going_on_from(tmp_path / "a"), ONE_ROUND)
    assert f"goes on from {tmp_path / 'a'}, trained on {tiny_folder}" in shown
    assert logged_losses(tmp_path / "run", 0) == logged_losses(first, 2)  # at every k: s is there too
    assert logged_losses(tmp_path / "run", 1) != logged_losses(first, 2)
    before, after = read_checkpoint(first).state, read_checkpoint(tmp_path / "run").state
    moved = {
        name
        for name, value in after.adapter.tensors().items()
        if not value.equal(before.adapter.tensors()[name])
    }
    assert moved == before.adapter.tensors().keys()


@pytest.mark.slow
def test_a_method_that_fixes_s_starts_with_its_own(first: Path, tiny_folder: Path, tmp_path: Path) -> None:
    learned = read_checkpoint(first).state.rescalers
    assert learned[1].tolist() != [1.0] * 2
    for method, expected in (("none", 1.0), ("static", 4.0)):
        run = tmp_path / method
        tiny_run(tiny_folder, run, going_on_from(first / "adapter"), f"strategy.rescaler={method}", ONE_ROUND)
        assert read_checkpoint(run).state.rescalers[1].tolist() == [expected] * 2


@pytest.mark.slow
def test_resumption_needs_no_adapter_folder(
    first: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    shutil.copytree(first / "adapter", folder)
    tiny_run(tiny_folder, tmp_path / "whole", going_on_from(folder))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, (2, 0))
        tiny_run(tiny_folder, tmp_path / "killed", going_on_from(folder))
    shutil.rmtree(folder)
    tiny_run(tiny_folder, tmp_path / "killed", going_on_from(folder), existing="resume")
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    killed, whole = (read_checkpoint(tmp_path / name).state for name in ("killed", "whole"))
    assert {k: s.tolist() for k, s in killed.rescalers.items()} == {
        k: s.tolist() for k, s in whole.rescalers.items()
    }


def test_a_run_may_replace_the_run_whose_adapter_it_goes_on_from(
    first: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(first, run)
    tiny_run(tiny_folder, run, going_on_from(run / "adapter"), ONE_ROUND, existing="overwrite")
    assert logged_losses(run, 0) == logged_losses(first, 2)


def peft_adapter(base: Path, folder: Path, **settings: object) -> None:
    """A folder that PEFT writes, of random values."""
    torch.manual_seed(0)
    settings = {
        "r": 3,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "target_parameters": FUSED,
        **settings,
    }
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", **settings),  # type: ignore[arg-type]
    )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_of_peft(qwen_folder: Path, tmp_path: Path) -> None:
    peft_adapter(qwen_folder, tmp_path / "a")
    shown = tiny_run(qwen_folder, tmp_path / "run", going_on_from(tmp_path / "a"), ONE_ROUND)
    assert "adapter in the fused layout: PEFT reads none per expert for qwen2_moe models" in " ".join(
        shown.split()
    )
    options = ("--active-experts", "4", *WITHOUT_ADAPTER)
    loss = losses(tmp_path / "a", *options)[4]
    assert logged_losses(tmp_path / "run", 0)[4] == pytest.approx(loss, rel=1e-6)
    assert losses(qwen_folder, *options)[4] != pytest.approx(loss, rel=1e-3)


def test_every_family_ends_with_an_adapter_that_holds_the_runs_loss(
    qwen_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tiny_run(qwen_folder, run, "training.learning_rate=0.02", ONE_ROUND)
    assert "target_parameters" in json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert losses(run / "adapter", *WITHOUT_ADAPTER) == pytest.approx(logged_losses(run, 1), rel=1e-6)


def test_a_layout_that_peft_does_not_read_is_one_line(qwen_folder: Path, tmp_path: Path) -> None:
    tiny_run(qwen_folder, tmp_path / "run", ONE_ROUND)
    result = invoke("export", tmp_path / "run", "--to", tmp_path / "a", "--layout", "per-expert")
    assert (result.exit_code, result.stderr) == (
        2,
        "fedflame: PEFT reads no per-expert adapter for qwen2_moe models; use --layout fused\n",
    )
    assert not (tmp_path / "a").exists()


def test_merge_has_no_layout(first: Path, tmp_path: Path) -> None:
    result = invoke("export", first, "--to", tmp_path / "a", "--merge", "--layout", "fused")
    assert (result.exit_code, result.stderr) == (
        2,
        "fedflame: --layout is of an adapter for PEFT; with --merge or --gguf there is none\n",
    )


REFUSED = {
    "adapter.r = 5, adapter.lora_alpha = 16: the adapter in .* has r = 3, lora_alpha = 16;": "adapter.r=5",
    "adapter.lora_alpha = 3: the adapter in": "adapter.lora_alpha=3",
    "adapter.target_modules = 'q_proj' lacks k_proj,v_proj,o_proj, which": "adapter.target_modules=q_proj",
    "nowhere/adapter_config.json: No such file or directory; no adapter folder": going_on_from(
        Path("nowhere")
    ),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_settings_that_do_not_fit_are_one_line_before_anything_is_written(
    reason: str, first: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        tiny_run(tiny_folder, tmp_path / "run", going_on_from(first / "adapter"), REFUSED[reason])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_broken_adapter_leaves_the_run_that_would_be_replaced(
    first: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(first, tmp_path / "run")
    shutil.copytree(first / "adapter", tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: its checksum is wrong"):
        tiny_run(tiny_folder, tmp_path / "run", going_on_from(tmp_path / "a"), existing="overwrite")
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(first / "adapter", tmp_path / "a")
    (tmp_path / "a" / "fedflame.json").unlink()
    (tmp_path / "a" / "rescalers.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match="truncated or no safetensors"):
        tiny_run(tiny_folder, tmp_path / "run", going_on_from(tmp_path / "a"), existing="overwrite")
    assert checkpoint_bytes(tmp_path / "run") == checkpoint_bytes(first)


def test_more_attention_projections_than_the_adapters(qwen_folder: Path, tmp_path: Path) -> None:
    peft_adapter(qwen_folder, tmp_path / "a")
    config = tiny_config(qwen_folder, tmp_path / "run")
    assert with_target_modules(config).adapter.target_modules == tuple(ATTENTION)
    tiny_run(qwen_folder, tmp_path / "run", going_on_from(tmp_path / "a"), ONE_ROUND)
    adapted, _ = load_adapted_model(str(qwen_folder), "float32", config.adapter)
    assert load_rescalers(tmp_path / "a", adapted) == {}
    attention = read_checkpoint(tmp_path / "run").state.adapter.attention
    assert {name for name in attention if name.endswith(".B") and attention[name].any()} == {
        name for name in attention if name.endswith(".B")
    }


def test_evaluating_an_adapter_that_names_no_base(first: Path, tmp_path: Path) -> None:
    shutil.copytree(first / "adapter", tmp_path / "a")
    (tmp_path / "a" / "fedflame.json").unlink()
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    result = invoke("evaluate", tmp_path / "a")
    assert (result.exit_code, result.stderr) == (
        2,
        f"fedflame: {tmp_path / 'a'}: adapter_config.json names no base model\n",
    )
