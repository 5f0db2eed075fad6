"""Whole runs of methods that freeze a half or merge factors, and the commands that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.exact_methods import FFALoRA, FLoRA
from tests.tiny_models import TOP_K
from tests.tiny_runs import adapter_bytes, events, invoke, tiny_run
from transformers import AutoModelForCausalLM

from fedflame.client import fine_tune
from fedflame.server.checkpoint import read_checkpoint
from fedflame.strategies import FedAvg
from fedflame.strategies.base import Strategy

K = 2


def a_run(strategy: Strategy, model: Path, run: Path, *overrides: str, **options: Any) -> str:
    settings = ("server.num_server_rounds=2", "training.learning_rate=0.02", *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedflame.commands.run.build_strategy", lambda *_: strategy)
        return tiny_run(model, run, *settings, **options)


def last_losses(run: Path) -> dict[str, float]:
    last = [e for e in events(run, "evaluation") if e["category"] is None and e["round"] == 2]
    return {str(event["active_experts"]): event["loss"] for event in last}


def losses(*command: str | Path) -> dict[str, float]:
    settings = ("data.max_rows=48", "data.max_length=120", "evaluation.rows_per_category=1")
    options = [part for setting in settings for part in ("--set", setting)]
    result = invoke("evaluate", *command, *options, "--json")
    assert result.exit_code == 0, result.stderr
    return {k: values["all"]["loss"] for k, values in json.loads(result.stdout).items()}


def test_traffic_of_whole_runs_is_half_up_for_ffa_and_grows_down_for_flora(
    tiny_folder: Path, tmp_path: Path
) -> None:
    traffic = {}
    for strategy in (FedAvg(K), FFALoRA(K), FLoRA(K)):
        name = type(strategy).__name__
        a_run(strategy, tiny_folder, tmp_path / name, "adapter.r=16")
        assert not events(tmp_path / name, "excluded")
        clients = events(tmp_path / name, "client")
        traffic[name] = [[e["bytes_up"], e["bytes_down"]] for e in clients if e["client"] == 0]
    (up, down), (_, down_again) = traffic["FedAvg"]
    assert down_again == pytest.approx(down, rel=0.01)
    assert 0.45 * up < traffic["FFALoRA"][0][0] < 0.55 * up
    (_, first), (_, second) = traffic["FLoRA"]
    assert first == down
    assert second == pytest.approx((1 + 3) * first, rel=0.02), "the factors of three clients come along"


def test_a_run_with_merged_factors_resumes_to_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    a_run(FLoRA(K), tiny_folder, tmp_path / "whole")

    def killed_in_round_2(adapted, examples, plan, pad_token_id, on_step):  # type: ignore[no-untyped-def]
        if plan.round == 2 and plan.client == 1:
            raise KeyboardInterrupt
        return fine_tune(adapted, examples, plan, pad_token_id, on_step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fedflame.server.local_clients.fine_tune", killed_in_round_2)
        a_run(FLoRA(K), tiny_folder, tmp_path / "killed")
    assert read_checkpoint(tmp_path / "killed").round == 1
    a_run(FLoRA(K), tiny_folder, tmp_path / "killed", existing="resume")
    one, other = (read_checkpoint(tmp_path / run).state for run in ("whole", "killed"))
    assert one.merged.rank == other.merged.rank == 2 * 3 * 3
    for name, value in one.total.tensors().items():
        assert torch.equal(value, other.total.tensors()[name]), name
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    assert last_losses(tmp_path / "killed") == last_losses(tmp_path / "whole")


def test_every_command_counts_merged_factors_in(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    a_run(FLoRA(K), tiny_folder, run)
    wanted = last_losses(run)
    first = [e["loss"] for e in events(run, "evaluation") if e["category"] is None and e["round"] == 0]
    assert abs(first[0] - wanted["4"]) > 0.05
    assert losses(run) == pytest.approx(wanted, rel=1e-6)
    assert losses(run / "adapter") == pytest.approx(wanted, rel=1e-5)
    result = invoke("export", run, "--to", tmp_path / "merged", "--merge")
    assert result.exit_code == 0, result.stderr
    assert losses(tmp_path / "merged")["4"] == pytest.approx(wanted["4"], rel=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_experts_per_tok == TOP_K
