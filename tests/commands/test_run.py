from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli_process import CliProcess
from tests.random_rounds import assert_same_bits
from tests.tiny_models import EXPERTS, LAYERS, TOP_K, tiny_olmoe
from tests.tiny_runs import (
    ANSWERS,
    ONE_ROUND,
    adapter_bytes,
    arguments,
    checkpoint_bytes,
    events,
    invoke,
    start_cli,
    state_bytes,
    tiny_config,
    tiny_run,
)

from fedflame.checked_json import write_checked
from fedflame.config.run_config import SCHEMA_VERSION
from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment
from fedflame.exports import export_adapter
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.run_files.checkpoints import checkpoint_path
from fedflame.run_files.lines import read_lines
from fedflame.server.checkpoint import read_checkpoint
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.buffer import unpack
from fedflame.wire.codec import decode_update
from fedflame.wire.frame import unseal
from fedflame.wire.planes import decompress
from loopback import alive, descendants

TWO_ROWS = "training.per_device_train_batch_size=2"
Misbehave = Callable[[RoundPlan, ClientUpdate], ClientUpdate]


@pytest.fixture
def finished(undisturbed: Callable[..., Path]) -> Path:
    """A run that nothing disturbed."""
    return undisturbed()


@pytest.fixture
def misbehave(monkeypatch: pytest.MonkeyPatch) -> Callable[[Misbehave], None]:
    """Let clients' updates pass through a function before they are sent."""

    def install(change: Misbehave) -> None:
        def changed(adapted, examples, plan, *more):  # type: ignore[no-untyped-def]
            return change(plan, fine_tune(adapted, examples, plan, *more))

        monkeypatch.setattr("fedflame.clients.local.fine_tune", changed)

    return install


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


@pytest.mark.parametrize("mode", ["experts", "layers"])
def test_a_run_that_keeps_less_for_the_backward_has_the_same_bytes(
    mode: str, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_run(tiny_folder, tmp_path / "run", f"training.gradient_checkpointing={mode}")
    one, other = (read_checkpoint(run).state for run in (tmp_path / "run", finished))
    for k in (4, 2, 1):
        assert_same_bits(one.adapter_at(k), other.adapter_at(k))
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


def test_the_same_run_twice_gives_the_same_bytes(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tiny_run(tiny_folder, tmp_path / "again")
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(finished)
    assert state_bytes(tmp_path / "again") == state_bytes(finished)


def test_another_seed_gives_other_bytes(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tiny_run(tiny_folder, tmp_path / "other", "seed=1")
    assert adapter_bytes(tmp_path / "other") != adapter_bytes(finished)


@pytest.mark.timeout(240)
def test_killed_at_three_instants_and_resumed_it_ends_in_the_same_bytes(
    undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    finished = undisturbed(ANSWERS)  # to generate the last of them takes longer than the kill
    run, rng = tmp_path / "killed", random.Random(time.time_ns())
    lines = len((finished / "metrics.jsonl").read_text().splitlines())
    goals = sorted(rng.sample(range(1, lines - 1), 3))
    for number, goal in enumerate(goals):
        process = start(tiny_folder, run, "--set", ANSWERS, *(["--resume"] if number else []))
        wait_for_lines(process, run / "metrics.jsonl", goal)
        time.sleep(rng.random() * 0.05)
        process.kill()
        assert process.wait(20) == -signal.SIGKILL, f"goals {goals}"
    begun = (run / "config.json").exists()
    process = start(tiny_folder, run, "--set", ANSWERS, "--resume" if begun else "--overwrite")
    assert process.wait(60) == 0, f"goals {goals}"
    assert adapter_bytes(run) == adapter_bytes(finished), f"goals {goals}"
    assert state_bytes(run) == state_bytes(finished)
    assert timeless(run) == timeless(finished)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_rounded_and_packed_what_clients_owe_survives_a_kill_with_workers_of_which_none_is_left(
    finished: Path, undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    packing, rounding = ("training.packing=true", TWO_ROWS), "communication.update_dtype=int8"
    alone, killed = undisturbed(*packing, rounding), tmp_path / "killed"
    goal = random.Random(time.time_ns()).randrange(
        10, len((alone / "metrics.jsonl").read_text().splitlines())
    )
    setting = [part for setting in (*packing, rounding) for part in ("--set", setting)]
    process = start(tiny_folder, killed, *setting, "--workers", "3")
    wait_for_lines(process, killed / "metrics.jsonl", 1)
    children = descendants(process.pid)
    assert len(children) >= 3, "the fork server and two other workers, which are there before the first round"
    wait_for_lines(process, killed / "metrics.jsonl", goal)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL, f"goal {goal}"
    wait_until_gone(children)
    tiny_run(tiny_folder, killed, *packing, rounding, existing="resume")
    assert adapter_bytes(killed) == adapter_bytes(alone), f"goal {goal}"
    assert state_bytes(killed) == state_bytes(alone)
    assert len({adapter_bytes(run) for run in (finished, undisturbed(*packing), alone)}) == 3


def test_rounded_updates_take_less_than_half_the_bytes(
    finished: Path, undisturbed: Callable[..., Path]
) -> None:
    runs = finished, undisturbed("communication.update_dtype=int8")
    before, after = (sum(event["bytes_up"] for event in events(run, "client")) for run in runs)
    assert after < 0.5 * before  # headers are a large part of such small messages


ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ENDS)
def test_a_run_that_is_told_to_end_says_how_to_go_on_and_goes_on_to_the_same_bytes(
    end: signal.Signals, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(tiny_folder, run)
    wait_for_lines(process, run / "metrics.jsonl", 34)
    process.send_signal(end)
    errors = process.stderr(120)
    assert process.returncode == 128 + end
    kept = read_checkpoint(run).round
    assert errors == f"fedflame: {ENDS[end]}; the same command with --resume goes on after round {kept}\n"
    assert kept < 3
    assert "<html" in (run / "report.html").read_text()
    assert not (run / ".lock").exists()
    assert start(tiny_folder, run, "--resume").wait(90) == 0
    assert adapter_bytes(run) == adapter_bytes(finished)
    assert state_bytes(run) == state_bytes(finished)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [2, 3])
def test_worker_processes_change_no_byte(
    workers: int, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run_experiment(prepare(tiny_config(tiny_folder, tmp_path / "run")), workers=workers)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)
    assert state_bytes(tmp_path / "run") == state_bytes(finished)
    assert timeless(tmp_path / "run") == timeless(finished)


def test_an_existing_run_is_neither_touched_nor_forgotten(finished: Path, tiny_folder: Path) -> None:
    before = checkpoint_bytes(finished)
    result = invoke(*arguments(tiny_folder, finished))
    assert result.exit_code == 2
    assert result.stderr == (
        f"fedflame: {finished}: exists already; --resume goes on with it, --overwrite starts anew\n"
    )
    assert checkpoint_bytes(finished) == before


def test_overwrite_starts_anew(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND, existing="overwrite")
    assert read_checkpoint(tmp_path / "run").round == 1
    assert len(events(tmp_path / "run", "round")) == 1


def test_overwrite_keeps_the_old_run_if_the_new_one_cannot_start(
    undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed(ONE_ROUND), tmp_path / "run")
    before = checkpoint_bytes(tmp_path / "run")
    with pytest.raises(UserError, match="num_clients"):
        tiny_run(tiny_folder, tmp_path / "run", "clients.num_clients=400", existing="overwrite")
    assert checkpoint_bytes(tmp_path / "run") == before


def test_overwrite_removes_no_folder_that_is_not_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        tiny_run(tiny_folder, tmp_path / "thesis", existing="overwrite")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_run_of_another_version_is_left_with_the_key_that_is_not_known(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.json"
    values = json.loads(tiny_config(tiny_folder, tmp_path / "run").model_dump_json())
    values["strategy"]["k_rotation"] = "odd"
    write_checked(path, {"schema_version": SCHEMA_VERSION} | values)
    with pytest.raises(UserError) as error:
        tiny_run(tiny_folder, tmp_path / "run", existing="resume")
    assert str(error.value) == (
        f"{path}, which is left as it is: strategy.k_rotation = 'odd': "
        "Input should be 'auto', 'none', 'smaller' or 'all'"
    )
    assert "odd" in path.read_text()


def test_resume_refuses_another_configuration_and_names_the_key(finished: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"training\.learning_rate differs"):
        tiny_run(tiny_folder, finished, "training.learning_rate=0.5", existing="resume")


def test_resume_refuses_other_data(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"say {n}", "response": str(n)}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = f"data.dataset_name={tmp_path / 'rows.jsonl'}"
    tiny_run(tiny_folder, tmp_path / "run", data)
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:-1], rows[-1].replace("say", "tell")]))
    with pytest.raises(UserError, match="--resume needs the data it was started with"):
        tiny_run(tiny_folder, tmp_path / "run", data, existing="resume")


def test_a_run_folder_may_be_moved_and_resumed(
    undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed(ONE_ROUND), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    tiny_run(tiny_folder, tmp_path / "moved", ONE_ROUND, existing="resume")
    assert read_checkpoint(tmp_path / "moved").round == 1


def test_resume_without_a_run_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder"):
        tiny_run(tiny_folder, tmp_path / "nothing", existing="resume")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_checkpoint_is_refused_and_left_alone(
    kept: int, undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed(ONE_ROUND), tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", 1)
    path.write_bytes(path.read_bytes()[:kept])
    damaged, metrics = path.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"truncated or damaged|that are no fedflame checkpoint") as error:
        tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND, existing="resume")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == damaged
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


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


def test_a_full_disk_while_checkpointing_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def full_in_round_2(descriptor: int) -> None:
        started = (run / "metrics.jsonl").exists() and len(events(run, "round")) == 2
        if started and ".partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_in_round_2)
        with pytest.raises(UserError, match=r"cannot write .* bytes: No space left on device"):
            tiny_run(tiny_folder, run)
    assert read_checkpoint(run).round == 1
    assert not list(run.rglob("*.partial"))
    tiny_run(tiny_folder, run, existing="resume")
    assert adapter_bytes(run) == adapter_bytes(finished)


def test_fedavg_at_the_smallest_k_runs_and_is_evaluated_at_every_tier(
    tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_run(tiny_folder, tmp_path / "run", "strategy.name=fedavg", ONE_ROUND)
    assert {e["active_experts"] for e in events(tmp_path / "run", "client")} == {1}
    assert {e["active_experts"] for e in events(tmp_path / "run", "evaluation")} == {4, 2, 1}


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


def test_a_fraction_of_the_clients_is_sampled(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_run(tiny_folder, run, "server.fraction_train=0.4", "server.num_server_rounds=6")
    per_round = [[e["client"] for e in events(run, "client") if e["round"] == r] for r in range(1, 7)]
    assert all(len(clients) == 1 for clients in per_round)
    assert len({clients[0] for clients in per_round}) > 1


def start(model: Path, run: Path, *flags: str) -> CliProcess:
    """`fedflame run` as a process of its own."""
    return start_cli(*arguments(model, run), *flags)


def wait_for_lines(process: CliProcess, metrics: Path, goal: int) -> None:
    """Until metrics.jsonl has `goal` lines; fails if the process ends before."""
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < goal:
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline, f"{goal} lines in a minute"
        time.sleep(0.002)


def wait_until_gone(children: Sequence[int]) -> None:
    deadline = time.monotonic() + 60  # one that is still importing finds out when it is done
    while left := [child for child in children if alive(child)]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.02)


def timeless(run: Path) -> list[dict[str, object]]:
    """The metrics without what a clock wrote."""
    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
