"""Whole runs: what a run leaves, what its clients are told and say, and how often it is evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.commands.conftest import Misbehave
from tests.same_bits import assert_same_adapter
from tests.tiny_models import EXPERTS, LAYERS, TOP_K, tiny_olmoe
from tests.tiny_runs import (
    ANSWERS,
    ONE_ROUND,
    adapter_bytes,
    events,
    invoke,
    state_bytes,
    tiny_config,
    tiny_run,
)

from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import export_adapter
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.server.checkpoint import read_checkpoint
from fedflame.wire.buffer import unpack
from fedflame.wire.codec import decode_update
from fedflame.wire.frame import unseal
from fedflame.wire.planes import decompress


def test_a_run_leaves_everything_the_design_names(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "adapter", "checkpoint", "config.json", "config.toml", "environment.json", "metrics.jsonl",
        "partition.json", "plan.json", "prompt.json", "report.html", "skipped.jsonl",
    }  # fmt: skip
    assert "<html" in (finished / "report.html").read_text()


def test_counts_and_tokens_of_every_client_add_up(finished: Path) -> None:
    updates = events(finished, "client")
    assert [(e["round"], e["client"], e["active_experts"]) for e in updates] == [
        (round_number, client, k)
        for round_number, turns in enumerate(((4, 1, 1), (2, 2, 1), (4, 1, 1)), start=1)
        for client, k in enumerate(turns)
    ]
    for event in updates:
        counts = torch.tensor(event["counts"])
        assert counts.shape == (LAYERS, EXPERTS)
        assert counts.sum(1).tolist() == [event["tokens"] * event["active_experts"]] * LAYERS


def test_steps_by_tokens_are_as_large_as_each_client_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    budgets = (130, 260, 520)  # rows have at most 120 tokens
    override = f"training.tokens_per_step={','.join(map(str, budgets))}"
    tiny_run(tiny_folder, tmp_path / "run", override, ONE_ROUND)
    for event, budget in zip(events(tmp_path / "run", "client"), budgets, strict=True):
        assert event["steps"] == 2
        assert 0.5 * 2 * budget < event["tokens"] <= 2 * budget


def test_packed_steps_have_as_many_tokens_as_fit(tiny_folder: Path, tmp_path: Path) -> None:
    run, packing = tmp_path / "run", ("training.packing=true", "training.per_device_train_batch_size=1")
    tiny_run(tiny_folder, run, *packing, ONE_ROUND)
    for event in events(run, "client"):  # data.max_length is 120
        assert event["steps"] == 2 and 0.5 * 2 * 120 < event["tokens"] <= 2 * 120


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ((), (0, False)),
        (("training.packing=true",), (120, False)),
        (("training.padding_free=true",), (0, True)),
    ],
    ids=["padded", "packing", "padding_free"],
)
def test_plans_say_how_rows_are_laid_out(
    settings: tuple[str, ...],
    layout: tuple[int, bool],
    misbehave: Callable[[Misbehave], None],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    plans: list[RoundPlan] = []

    def noted(plan: RoundPlan, update: ClientUpdate) -> ClientUpdate:
        plans.append(plan)
        return update

    misbehave(noted)
    tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND, *settings)
    assert [(plan.packed_length, plan.padding_free) for plan in plans] == [layout] * 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["experts", "layers"])
def test_a_run_that_keeps_less_for_the_backward_has_the_same_bytes(
    mode: str, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_run(tiny_folder, tmp_path / "run", f"training.gradient_checkpointing={mode}")
    one, other = (read_checkpoint(run).state for run in (tmp_path / "run", finished))
    for k in (4, 2, 1):
        assert_same_adapter(one.adapter_at(k), other.adapter_at(k))
    memory = [
        [tier["training_memory_bytes"] for tier in json.loads((run / "plan.json").read_text())["tiers"]]
        for run in (tmp_path / "run", finished)
    ]
    assert all(less < more for less, more in zip(*memory, strict=True))


@pytest.mark.parametrize("trained", ["flame", "1", "4"])
def test_under_a_compute_budget_every_client_spends_what_flame_does_at_its_k(
    trained: str, tiny_folder: Path, tmp_path: Path
) -> None:
    method = ("strategy.k_rotation=none",)
    if trained != "flame":
        method = ("strategy.name=fedavg", f"strategy.active_experts={trained}")
    settings = ("training.budget=compute", "training.max_steps=7", ONE_ROUND)
    tiny_run(tiny_folder, tmp_path / "run", *method, *settings)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    flops = {tier["active_experts"]: tier["training_flops_per_token"] for tier in plan["tiers"]}
    updates = events(tmp_path / "run", "client")
    for event, planned, affords in zip(updates, plan["clients"], (4, 2, 1), strict=True):
        k = affords if trained == "flame" else int(trained)
        assert event["active_experts"] == planned["trained_experts"] == k
        assert event["steps"] == planned["steps"]
        assert abs(event["steps"] * flops[k] - 7 * flops[affords]) < flops[k]
        assert event["training_flops"] == pytest.approx(event["tokens"] * flops[k])
    steps = [event["steps"] for event in updates]
    assert {
        "flame": steps == [7, 7, 7],
        "1": steps[0] > steps[1] > steps[2] == 7,
        "4": 7 == steps[0] > steps[1] > steps[2],
    }[trained]


def test_every_tier_is_evaluated_before_and_after_every_round(undisturbed: Callable[..., Path]) -> None:
    together = [e for e in events(undisturbed(ANSWERS), "evaluation") if e["category"] is None]
    assert [(e["round"], e["active_experts"]) for e in together] == [
        (round_number, k) for round_number in range(4) for k in (4, 2, 1)
    ]
    generated = [e["round"] for e in together if e["exact_match"] is not None]
    assert sorted(set(generated)) == [0, 3]


def test_only_activated_experts_travel_up(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds of a few tokens, of which no layer's router sends one to each expert."""
    messages: list[bytes] = []

    def noted(message: bytes, plan: RoundPlan) -> ClientUpdate:
        messages.append(message)
        return decode_update(message, plan)

    monkeypatch.setattr("fedflame.server.updates.decode_update", noted)
    few = ("data.max_length=16", "training.per_device_train_batch_size=1", "training.max_steps=1")
    tiny_run(tiny_folder, tmp_path / "run", *few)
    partial = 0
    for message, event in zip(messages, events(tmp_path / "run", "client"), strict=True):
        assert len(message) == event["bytes_up"]
        tensors, _ = unpack(decompress(unseal(message), 1 << 20))
        for layer, counts in enumerate(event["counts"]):
            activated = sum(count > 0 for count in counts)
            partial += 0 < activated < EXPERTS
            assert {len(tensors[f"experts.{layer}.{bank}"]) for bank in ("A1", "B1", "A2", "B2")} == {
                activated
            }
    assert partial > 2


def test_the_exported_adapter_is_the_last_checkpoint(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_folder, finished)
    checkpoint = read_checkpoint(finished)
    export_adapter(checkpoint.state, trained_run(config, checkpoint.round), tiny_olmoe(), tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == adapter_bytes(finished)
    assert checkpoint.round == 3
    assert any(bool(bank.abs().max() > 0) for bank in checkpoint.state.adapter.experts.values())


@pytest.mark.slow
def test_rounded_updates_take_less_than_half_the_bytes(
    finished: Path, undisturbed: Callable[..., Path]
) -> None:
    runs = finished, undisturbed("communication.update_dtype=int8")
    before, after = (sum(event["bytes_up"] for event in events(run, "client")) for run in runs)
    assert after < 0.5 * before  # headers are a large part of such small messages


def test_fedavg_at_the_smallest_k_runs_and_is_evaluated_at_every_tier(
    tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_run(tiny_folder, tmp_path / "run", "strategy.name=fedavg", ONE_ROUND)
    assert {e["active_experts"] for e in events(tmp_path / "run", "client")} == {1}
    assert {e["active_experts"] for e in events(tmp_path / "run", "evaluation")} == {4, 2, 1}


@pytest.mark.slow
@pytest.mark.parametrize(("every", "rounds"), [(1, {0, 1, 2, 3}), (2, {0, 2, 3}), (0, {0, 3})])
def test_a_run_is_evaluated_as_often_as_asked_and_learns_the_same(
    every: int, rounds: set[int], finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_run(tiny_folder, tmp_path / "run", f"evaluation.evaluate_every={every}")
    assert {event["round"] for event in events(tmp_path / "run", "evaluation")} == rounds
    assert state_bytes(tmp_path / "run") == state_bytes(finished)


def test_a_run_of_no_new_tokens_is_measured_by_loss_alone(
    finished: Path, undisturbed: Callable[..., Path]
) -> None:
    run, with_answers = finished, undisturbed(ANSWERS)
    found, scored = events(run, "evaluation"), events(with_answers, "evaluation")
    assert [event["loss"] for event in found] == [event["loss"] for event in scored]
    assert all(event["exact_match"] is None and event["rouge_l"] is None for event in found)
    assert any(event["exact_match"] is not None for event in scored)
    assert state_bytes(run) == state_bytes(with_answers)
    assert "This run has no scores by generation." in (run / "report.html").read_text()
    result = invoke("evaluate", run, "--json")
    assert all(k["all"]["exact_match"] is None for k in json.loads(result.output).values())


@pytest.mark.parametrize("rescaler", ["none", "static", "mass"])
def test_every_rescaler_option_runs(rescaler: str, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run(tiny_folder, run, f"strategy.rescaler={rescaler}", ONE_ROUND)
    values = {event["active_experts"]: event["rescaler"] for event in events(run, "client")}
    assert values[TOP_K] == [1.0] * LAYERS
    if rescaler == "none":
        assert values[1] == [1.0] * LAYERS
    elif rescaler == "static":
        assert values[1] == [float(TOP_K)] * LAYERS
    else:
        assert all(1 < mass < TOP_K for mass in values[1])


@pytest.mark.slow
def test_a_fraction_of_the_clients_is_sampled(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run(tiny_folder, run, "server.fraction_train=0.4", "server.num_server_rounds=6")
    per_round = [[e["client"] for e in events(run, "client") if e["round"] == r] for r in range(1, 7)]
    assert all(len(clients) == 1 for clients in per_round)
    assert len({clients[0] for clients in per_round}) > 1
