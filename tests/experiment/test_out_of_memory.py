"""A full memory ends a run, or an evaluation, in one line, and the run goes on from its last round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_runs import adapter_bytes, arguments, invoke, tiny_run

from fedflame.messages import RoundPlan
from fedflame.server.checkpoint import read_checkpoint
from fedflame.training.fine_tune import fine_tune

TWO_ROUNDS = "server.num_server_rounds=2"
GOES_ON = "also with another device or gradient_checkpointing; other changes need a new run\n"


def too_large(*arguments: object, **settings: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.\nGPU 0 has")


@pytest.mark.slow
def test_a_run_whose_training_fills_the_memory_goes_on_with_less_kept_for_the_backward(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(adapted: Any, rows: Any, plan: RoundPlan, *more: Any) -> Any:
        return too_large() if (plan.round, plan.client) == (2, 1) else fine_tune(adapted, rows, plan, *more)

    tiny_run(tiny_folder, tmp_path / "whole", TWO_ROUNDS)
    command = arguments(tiny_folder, tmp_path / "run", TWO_ROUNDS)
    with monkeypatch.context() as patch:
        patch.setattr("fedflame.clients.local.fine_tune", small)
        ended = invoke(*command)
    assert ended.exit_code == 2
    assert ended.stderr == (
        "fedflame: cpu ran out of memory while training at k = 2 with 4 rows per batch and "
        "gradient_checkpointing = 'none'; take gradient_checkpointing = 'experts' or 'layers', fewer tokens "
        "per batch, a smaller adapter.r, or a device with more memory. --resume goes on after round 1, "
        + GOES_ON
    )
    assert read_checkpoint(tmp_path / "run").round == 1
    assert invoke(*command, "--set", "training.tokens_per_step=8", "--resume").exit_code == 2
    resumed = invoke(*command, "--set", "training.gradient_checkpointing=experts", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


def test_a_run_whose_evaluation_fills_the_memory(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(tiny_folder, tmp_path / "run", TWO_ROUNDS)
    with monkeypatch.context() as patch:
        patch.setattr("fedflame.server.scoring.evaluate", too_large)
        ended = invoke(*command)
    assert ended.exit_code == 2
    assert ended.stderr == (
        "fedflame: cpu ran out of memory while evaluating at k = 4; take a device with more memory. --resume "
        f"goes on after round 0, {GOES_ON}"
    )
    assert invoke(*command, "--resume").exit_code == 0


@pytest.mark.slow
def test_an_evaluation_that_fills_the_memory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.training.evaluation.evaluate", too_large)
    ended = invoke("evaluate", tiny_folder, "--active-experts", "2")
    assert (ended.exit_code, ended.stderr) == (
        2,
        "fedflame: cpu ran out of memory while evaluating at k = 2; take a device with more memory\n",
    )
