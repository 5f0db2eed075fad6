"""Runs that go on from an adapter folder, and the folders that runs leave, through the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.tiny_exports import save_base
from tests.tiny_runs import SETTINGS, adapter_bytes, checkpoint_bytes, events, invoke, tiny_config, tiny_run
from transformers import AutoModelForCausalLM

from fedflame.commands import run as run_command
from fedflame.errors import UserError
from fedflame.export import load_adapter, read_settings
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.server.checkpoint import read_checkpoint

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def first(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"
    tiny_run(tiny_folder, run, "training.learning_rate=0.02", "server.num_server_rounds=2")
    return run


def losses(run: Path, round_number: int) -> dict[int, float]:
    evaluations = [e for e in events(run, "evaluation") if e["category"] is None and e["round"] == round_number]
    return {event["active_experts"]: event["loss"] for event in evaluations}


def start(folder: Path) -> str:
    return f"model.adapter_name_or_path={folder}"


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_a_run_starts_at_the_loss_of_its_adapter(
    layout: str, first: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    result = invoke("export", first, "--to", tmp_path / "a", "--layout", layout)
    assert (result.exit_code, result.stdout) == (0, f"written: {tmp_path / 'a'}\n"), result.stderr
    shown = tiny_run(tiny_folder, tmp_path / "run", start(tmp_path / "a"), "server.num_server_rounds=1")
    assert f"goes on from {tmp_path / 'a'}, trained on {tiny_folder}" in shown
    assert losses(tmp_path / "run", 0) == losses(first, 2)  # to the bit, k < K with its learned s
    assert losses(tmp_path / "run", 1) != losses(first, 2)
    before, after = read_checkpoint(first).state, read_checkpoint(tmp_path / "run").state
    assert {k: s.shape for k, s in after.rescalers.items()} == {k: s.shape for k, s in before.rescalers.items()}
    assert not torch.equal(after.rescalers[1], before.rescalers[1])


def test_a_method_that_fixes_s_starts_with_its_own(first: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert read_checkpoint(first).state.rescalers[1].tolist() != [1, 1]
    adapter = start(first / "adapter")
    for name, k, expected in (("strategy.rescaler=none", 1, 1.0), ("strategy.rescaler=static", 2, 2.0)):
        tiny_run(
            tiny_folder, tmp_path / "run", adapter, name, "server.num_server_rounds=1", existing="overwrite"
        ) if (tmp_path / "run").exists() else tiny_run(
            tiny_folder, tmp_path / "run", adapter, name, "server.num_server_rounds=1"
        )
        assert read_checkpoint(tmp_path / "run").state.rescalers[k].tolist() == [expected] * 2


def test_resumption_needs_no_adapter_folder(
    first: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first / "adapter", tmp_path / "a")
    tiny_run(tiny_folder, tmp_path / "whole", start(tmp_path / "a"))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    rounds = run_command.run_rounds
    with monkeypatch.context() as patch:
        patch.setattr(
            run_command,
            "run_rounds",
            lambda server, checkpoint: killed(
                rounds(
                    type(server)(**{**vars(server), "config": server.config.model_copy(
                        update={"server": server.config.server.model_copy(update={"num_server_rounds": 1})}
                    )}),
                    checkpoint,
                )
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            tiny_run(tiny_folder, tmp_path / "killed", start(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    tiny_run(tiny_folder, tmp_path / "killed", start(tmp_path / "a"), existing="resume")
