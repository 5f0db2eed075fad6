"""Clients that raise or send nonsense: left out with the reason, and the run goes on or stops in a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.commands.conftest import Misbehave
from tests.tiny_runs import ONE_ROUND, adapter_bytes, events, tiny_run

from fedflame.errors import UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.server.checkpoint import read_checkpoint


def test_a_client_that_raises_is_left_out_and_the_round_goes_on(
    misbehave: Callable[[Misbehave], None], tiny_folder: Path, tmp_path: Path
) -> None:
    def raise_for_client_1(plan: RoundPlan, update: ClientUpdate) -> ClientUpdate:
        if plan.client == 1:
            raise ArithmeticError("no result")
        return update

    misbehave(raise_for_client_1)
    shown = tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND)
    assert "round 1: client 1 is left out: ArithmeticError: no result" in shown
    assert [e["clients"] for e in events(tmp_path / "run", "round")] == [2]
    assert [e["client"] for e in events(tmp_path / "run", "client")] == [0, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda bank: bank.fill_(float("nan")), "update has a value in experts.0.A1 that is not finite"),
        (lambda bank: bank[:, :1], "the plan and the counts make it torch.float32 (6, 6, 24)"),
    ],
)
def test_nonsense_is_left_out_with_its_reason(
    change: Callable[[torch.Tensor], torch.Tensor],
    reason: str,
    misbehave: Callable[[Misbehave], None],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    def spoil_client_0(plan: RoundPlan, update: ClientUpdate) -> ClientUpdate:
        if plan.client:
            return update
        experts = {**update.delta.experts, "0.A1": change(update.delta.experts["0.A1"].clone())}
        return replace(update, delta=Adapter(experts, update.delta.attention))

    misbehave(spoil_client_0)
    tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND)
    (excluded,) = events(tmp_path / "run", "excluded")
    assert (excluded["client"], excluded["active_experts"]) == (0, 4)
    assert reason in excluded["reason"]
    values = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values()
    assert all(bool(torch.isfinite(value).all()) for value in values)


@pytest.mark.slow
def test_too_few_usable_updates_stop_the_run_and_it_resumes_from_the_round_before(
    misbehave: Callable[[Misbehave], None],
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    def fail_in_round_2(plan: RoundPlan, update: ClientUpdate) -> ClientUpdate:
        if plan.round == 2 and plan.client == 2:
            raise RuntimeError("gone")
        return update

    quorum = "server.min_clients=3"
    with monkeypatch.context():
        misbehave(fail_in_round_2)
        with pytest.raises(UserError, match=r"round 2: 2 usable updates; server\.min_clients = 3"):
            tiny_run(tiny_folder, tmp_path / "run", quorum)
    assert read_checkpoint(tmp_path / "run").round == 1
    misbehave(lambda plan, update: update)
    tiny_run(tiny_folder, tmp_path / "run", quorum, existing="resume")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)
    assert not events(tmp_path / "run", "excluded"), "the failed attempt is cut off on resume"
