"""Whole runs of every method, and the commands that read them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.altered_answers import interrupt
from tests.held_out_losses import logged_losses, losses
from tests.same_bits import assert_same_adapter
from tests.tiny_models import TOP_K
from tests.tiny_runs import adapter_bytes, arguments, events, invoke, set_options, tiny_run
from transformers import AutoModelForCausalLM

from fedflame.compare.grid import Cell
from fedflame.compare.results import CellResult, leave_result, take_over
from fedflame.config.methods import METHODS, NAMED_METHODS
from fedflame.experiment.run_folder import Existing, saved_config
from fedflame.report.records import read_run
from fedflame.server.checkpoint import read_checkpoint, write_checkpoint
from fedflame.strategies.hetlora import HetLoRA

pytestmark = pytest.mark.slow

SAME_ROWS = set_options("data.max_rows=48", "data.max_length=120", "evaluation.rows_per_category=1")
TWO_ROUNDS = ("server.num_server_rounds=2", "training.learning_rate=0.02")


def a_run(name: str, model: Path, run: Path, *overrides: str, existing: Existing = "refuse") -> str:
    return tiny_run(model, run, *TWO_ROUNDS, f"strategy.name={name}", *overrides, existing=existing)


@pytest.fixture(scope="session")
def of_command_line(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A method's run of two rounds, made once by the command line; not to be changed."""

    @functools.cache
    def run_of(name: str) -> Path:
        run = tmp_path_factory.mktemp("methods") / name
        result = invoke(*arguments(tiny_folder, run, *TWO_ROUNDS, f"strategy.name={name}"))
        assert result.exit_code == 0, result.stderr
        return run

    return run_of


@pytest.mark.parametrize("name", NAMED_METHODS)
def test_every_method_runs_from_the_command_line_and_learns(
    name: str, of_command_line: Callable[[str], Path]
) -> None:
    run = of_command_line(name)
    assert not events(run, "excluded")
    clients = [(e["active_experts"], e["rank"]) for e in events(run, "client") if e["round"] == 2]
    assert clients == (
        [(2, 3), (2, 3), (1, 3)]  # every k in turn, up to what each affords
        if name == "flame"
        else [(4, 3), (4, 1), (4, 1)]
        if METHODS[name].ranks == "afforded"
        else [(1, 3), (1, 3), (1, 3)]
    )
    first, last = ([e["loss"] for e in events(run, "client") if e["round"] == n] for n in (1, 2))
    assert sum(last) < sum(first)
    planned = json.loads((run / "plan.json").read_text())["tiers"]
    trained = {(e["active_experts"], e["rank"]) for e in events(run, "client")}
    assert sorted((t["active_experts"], t["rank"]) for t in planned if t["clients"]) == sorted(trained)


def test_a_method_that_cuts_ranks_is_evaluated_at_the_ranks_of_its_clients(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The scores are those of the adapter whose other ranks are zero."""
    run = tmp_path / "run"
    shown = a_run("hetlora", tiny_folder, run, "clients.ranks=3,1,2")
    deployed = events(run, "deployment")
    assert [(e["round"], e["active_experts"], e["rank"]) for e in deployed] == [
        (n, 4, rank) for n in (0, 1, 2) for rank in (2, 1)
    ]
    state = read_checkpoint(run).state
    whole = logged_losses(run, 2)[4]
    for event in deployed[-2:]:
        cut = replace(state, adapter=state.adapter.with_rank(event["rank"]).with_rank(3))
        write_checkpoint(run, replace(read_checkpoint(run), state=cut))
        assert losses(run)[4] == pytest.approx(event["loss"], rel=1e-5)
        assert abs(event["loss"] - whole) > 1e-4
        assert f"its first {event['rank']} ranks at k=4: loss {event['loss']:.3f}" in shown
    assert "What small devices deploy" in (run / "report.html").read_text()


def cell_of(name: str, model: Path, folder: Path, *overrides: str) -> CellResult:
    """The run as a finished cell of a comparison."""
    a_run(name, model, folder / "run", *overrides)
    run = read_run(folder / "run")
    cell = Cell(name, (), saved_config(folder / "run"), folder)
    leave_result(cell, run, dict.fromkeys((4, 2, 1), 1.0))
    return take_over(folder / "cells.jsonl", {}, [cell])[cell.name]


@pytest.mark.parametrize(
    ("name", "overrides", "places"),
    [
        ("hetlora", ("clients.ranks=3,1,2",), [(4, 4, 3), (2, 4, 1), (1, 4, 2)]),
        ("flora", ("clients.ranks=3,1,2",), [(4, 4, 3), (2, 4, 3), (1, 4, 3)]),
        ("flame", (), [(4, 4, 3), (2, 2, 3), (1, 1, 3)]),
        ("fedavg", (), [(4, 4, 3), (2, 2, 3), (1, 1, 3)]),
        ("fedavg", ("strategy.active_experts=full", "strategy.rank=1"), [(4, 4, 3), (2, 4, 3), (1, 4, 3)]),
    ],
)
def test_a_cell_says_what_each_device_deploys(
    name: str,
    overrides: tuple[str, ...],
    places: list[tuple[int, int, int]],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    result, run = cell_of(name, tiny_folder, tmp_path, *overrides), tmp_path / "run"
    assert [(d.budget, d.active_experts, d.rank) for d in result.deployed] == places
    cut = {(e["active_experts"], e["rank"]): e["loss"] for e in events(run, "deployment") if e["round"] == 2}
    whole = logged_losses(run, 2)
    assert [d.loss for d in result.deployed] == [cut.get((k, r), whole[k]) for _, k, r in places]
    tiers = json.loads((run / "plan.json").read_text())["tiers"]
    flops = {(tier["active_experts"], tier["rank"]): tier["forward_flops_per_token"] for tier in tiers}
    trained = 1 if "strategy.rank=1" in overrides else 3
    for deployed in result.deployed:
        place = deployed.active_experts, deployed.rank if deployed.rank < 3 else trained
        assert deployed.relative_flops == pytest.approx(flops[place] / flops[4, trained])


def test_planned_bytes_are_those_of_whole_runs(tiny_folder: Path, tmp_path: Path) -> None:
    """Up to the headers, and up at most, since experts without a token are not sent."""
    settings = ("adapter.r=16", "clients.ranks=16,7,2", "training.max_steps=1", "evaluation.evaluate_every=0")
    settings += ("server.fraction_evaluate=1",)
    for name in NAMED_METHODS:
        run = tmp_path / name
        a_run(name, tiny_folder, run, *settings)
        plan = json.loads((run / "plan.json").read_text())
        tiers = {(tier["active_experts"], tier["rank"]): tier for tier in plan["tiers"]}
        for event in events(run, "client"):
            tier = tiers[event["active_experts"], event["rank"]]
            merged = plan["merged_bytes_per_round"] * (event["round"] - 1)
            assert event["bytes_down"] - merged == pytest.approx(tier["bytes_down"], rel=0.02, abs=6000), name
            assert 0.2 * tier["bytes_up"] < event["bytes_up"] < tier["bytes_up"] + 6000, name
        scoring, told = plan["client_evaluation"], events(run, "client_evaluation")
        assert scoring["clients"] * scoring["evaluations"] == len(told) == 3 * 2, name
        for number in (0, 2):
            of_round = [event for event in told if event["round"] == number]
            down = sum(event["bytes_down"] for event in of_round)
            down -= 3 * plan["merged_bytes_per_round"] * number
            assert down == pytest.approx(scoring["bytes_down"], rel=0.02, abs=18_000), name
            assert sum(event["bytes_up"] for event in of_round) <= scoring["bytes_up"], name


def killed_and_resumed(
    name: str, model: Path, run: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, round_number: int = 2
) -> None:
    """The run, killed in this round and taken up again."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, (round_number, 1))
        a_run(name, model, run, *overrides)
    assert read_checkpoint(run).round == round_number - 1
    a_run(name, model, run, *overrides, existing="resume")


@pytest.mark.parametrize("name", NAMED_METHODS)
def test_a_run_that_was_killed_resumes_to_the_same_bytes(
    name: str,
    of_command_line: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    whole, killed = of_command_line(name), tmp_path / "killed"
    killed_and_resumed(name, tiny_folder, killed, monkeypatch)
    one, other = (read_checkpoint(run).state for run in (whole, killed))
    assert one.trainable == other.trainable
    assert_same_adapter(one.total_at(TOP_K), other.total_at(TOP_K))
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert logged_losses(killed, 2) == logged_losses(whole, 2)


def test_a_run_whose_clients_prune_their_ranks_resumes_to_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    # With the method's own penalty nothing shrinks in three rounds.
    defaults: tuple[Any, ...] = HetLoRA.__init__.__defaults__ or ()
    monkeypatch.setattr(HetLoRA.__init__, "__defaults__", (*defaults[:-1], 50.0))
    pruning = ("clients.ranks=3", "strategy.rank_decay=0.9")
    pruning += ("server.num_server_rounds=3", "training.max_steps=6")
    a_run("hetlora", tiny_folder, tmp_path / "whole", *pruning)
    killed_and_resumed("hetlora", tiny_folder, tmp_path / "killed", monkeypatch, *pruning, round_number=3)
    one, other = (read_checkpoint(tmp_path / run).state for run in ("whole", "killed"))
    assert one.ranks == other.ranks != {}
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")
    ranks = [[e["rank"] for e in events(tmp_path / "whole", "client") if e["round"] == n] for n in (1, 2, 3)]
    assert ranks[0] == ranks[1] == [3, 3, 3] and min(ranks[2]) == 2


def test_clients_take_their_turns_and_every_tier_learns_an_adapter(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    settings = ("training.budget=compute", "training.max_steps=6")
    shown = a_run("flame", tiny_folder, tmp_path / "run", *settings)
    updates = events(tmp_path / "run", "client")
    assert [e["active_experts"] for e in updates] == [4, 4, 1, 2, 2, 1]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    turns = {(cost["client"], cost["trained_experts"]): cost["steps"] for cost in plan["clients"]}
    assert turns.keys() == {(e["client"], e["active_experts"]) for e in updates}
    assert [turns[e["client"], e["active_experts"]] for e in updates] == [e["steps"] for e in updates]
    assert turns[1, 4] < 6 == turns[0, 4] < turns[0, 2]
    flops = {tier["active_experts"]: tier["training_flops_per_token"] for tier in plan["tiers"]}
    assert abs(turns[0, 2] * flops[2] - 6 * flops[4]) < flops[2]
    assert abs(turns[1, 4] * flops[4] - 6 * flops[2]) < flops[4]
    assert "trains at" in shown
    state = read_checkpoint(tmp_path / "run").state
    assert list(state.tier_adapters) == [2, 1]
    killed_and_resumed("flame", tiny_folder, tmp_path / "killed", monkeypatch, *settings)
    for k in (4, 2, 1):
        assert_same_adapter(read_checkpoint(tmp_path / "killed").state.adapter_at(k), state.adapter_at(k))


def test_every_command_takes_the_adapter_of_each_k(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    a_run("flame", tiny_folder, run)
    wanted = logged_losses(run, 2)
    state = read_checkpoint(run)
    assert losses(run) == pytest.approx(wanted, rel=1e-6)
    assert losses(run / "adapter", *SAME_ROWS) == pytest.approx(wanted, rel=1e-5)
    going_on = (f"model.adapter_name_or_path={run / 'adapter'}", "server.num_server_rounds=1")
    a_run("flame", tiny_folder, tmp_path / "next", *going_on)
    assert logged_losses(tmp_path / "next", 0) == pytest.approx(wanted, rel=1e-6)
    result = invoke("export", run, "--to", tmp_path / "merged", "--merge", "--active-experts", "1")
    assert result.exit_code == 0, result.stderr
    merged = losses(tmp_path / "merged", *SAME_ROWS, "--set", "clients.active_experts=1")
    assert merged[1] == pytest.approx(wanted[1], rel=1e-5)
    shared = replace(state, state=replace(state.state, tier_adapters={}))
    write_checkpoint(run, shared)
    assert abs(losses(run)[1] - wanted[1]) > 1e-4


def test_every_command_counts_merged_factors_in(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    a_run("flora", tiny_folder, run)
    assert read_checkpoint(run).state.merged.rank == 2 * (3 + 1 + 1)
    wanted = logged_losses(run, 2)
    assert abs(logged_losses(run, 0)[4] - wanted[4]) > 0.05
    assert losses(run) == pytest.approx(wanted, rel=1e-6)
    assert losses(run / "adapter", *SAME_ROWS) == pytest.approx(wanted, rel=1e-5)
    result = invoke("export", run, "--to", tmp_path / "merged", "--merge")
    assert result.exit_code == 0, result.stderr
    assert losses(tmp_path / "merged", *SAME_ROWS)[4] == pytest.approx(wanted[4], rel=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_experts_per_tok == TOP_K
