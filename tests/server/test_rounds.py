from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.altered_answers import interrupt
from tests.message_samples import an_update
from tests.tiny_runs import events, state_bytes, tiny_config, tiny_run

from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients
from fedflame.errors import InvalidMessage
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment
from fedflame.messages import RoundPlan
from fedflame.server.progress import Reporter
from fedflame.server.sampling import sample_clients
from fedflame.server.updates import validate_rows
from fedflame.strategies.base import ClientProfile
from fedflame.wire.codec import decode_plan

CLIENTS = [ClientProfile(client, 1 + client % 4, 3, 10 + client) for client in range(9)]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_sample_has_its_size_no_client_twice_and_client_order(count: int) -> None:
    numbers = [profile.client for profile in sample_clients(CLIENTS, count, 3, 1)]
    assert len(numbers) == count
    assert numbers == sorted(set(numbers))


def test_the_order_in_which_clients_are_listed_changes_nothing() -> None:
    shuffled = list(CLIENTS)
    random.Random(5).shuffle(shuffled)
    assert shuffled != CLIENTS
    for round_number in range(1, 6):
        assert sample_clients(shuffled, 4, 3, round_number) == sample_clients(CLIENTS, 4, 3, round_number)


def test_samples_differ_by_round_and_by_seed_and_reach_every_client() -> None:
    rounds = [tuple(p.client for p in sample_clients(CLIENTS, 4, 3, number)) for number in range(1, 41)]
    assert len(set(rounds)) > 20
    assert rounds[:5] != [tuple(p.client for p in sample_clients(CLIENTS, 4, 4, n)) for n in range(1, 6)]
    seen = Counter(client for sample in rounds for client in sample)
    assert set(seen) == set(range(9))
    # 40 rounds of 4 of 9: 17.8 on average, 5 standard deviations are 15.7.
    assert max(seen.values()) < 34


def test_the_habits_of_a_configuration_are_in_every_plan(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 48 rows in batches of 4, two to a step."""
    answer, plans = LocalClients.answer, list[RoundPlan]()

    def noted(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        plans.append(decode_plan(plan))
        return answer(self, plan, on_step)

    monkeypatch.setattr(LocalClients, "answer", noted)
    habits = (
        "training.num_train_epochs=0.5",
        "training.gradient_accumulation_steps=2",
        "training.max_grad_norm=0.75",
        "adapter.lora_dropout=0.1",
        "training.router_aux_loss_coef=0.02",
        "training.warmup_ratio=0.25",
        "training.lr_scheduler_type=linear",
        "training.local_lr_scheduler_type=cosine",
        "strategy.k_rotation=none",
        "server.num_server_rounds=2",
    )
    tiny_run(tiny_folder, tmp_path / "run", *habits)
    clients = events(tmp_path / "run", "client")
    asked = [(number, client) for number in (1, 2) for client in range(3)]
    assert [(plan.round, plan.client) for plan in plans] == asked
    for plan, told in zip(plans, clients, strict=True):
        assert (plan.num_train_epochs, plan.gradient_accumulation_steps) == (0.5, 2)
        assert (plan.lora_dropout, plan.router_aux_loss_coef) == (0.1, 0.02)
        assert (plan.max_grad_norm, plan.warmup_rounds, plan.lr_scheduler_type) == (0.75, 0.5, "cosine")
        batches = math.ceil(0.5 * math.ceil(told["num_examples"] / 4))
        assert told["steps"] == plan.max_steps == math.ceil(batches / 2)
    assert {plan.round: plan.learning_rate for plan in plans} == pytest.approx({1: 5e-3, 2: 5e-3 * 2 / 3})


@pytest.mark.slow
def test_a_run_of_epochs_that_is_resumed_gives_the_bytes_of_one_that_was_not(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    habits = (
        "training.num_train_epochs=0.5",
        "training.gradient_accumulation_steps=2",
        "training.warmup_ratio=0.5",
    )
    tiny_run(tiny_folder, tmp_path / "whole", *habits)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, (2, 1))
        tiny_run(tiny_folder, tmp_path / "ended", *habits)
    tiny_run(tiny_folder, tmp_path / "ended", *habits, existing="resume")
    assert state_bytes(tmp_path / "ended") == state_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_ended_within_its_first_round_does_not_evaluate_twice_before_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    one_round = "server.num_server_rounds=1"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalClients, "answer", end)
        tiny_run(tiny_folder, tmp_path / "ended", one_round)
    tiny_run(tiny_folder, tmp_path / "ended", one_round, existing="resume")
    tiny_run(tiny_folder, tmp_path / "undisturbed", one_round)
    assert state_bytes(tmp_path / "ended") == state_bytes(tmp_path / "undisturbed")
    for kind in ("evaluation", "round"):
        ended, undisturbed = (events(tmp_path / run, kind) for run in ("ended", "undisturbed"))
        assert [without_time(event) for event in ended] == [without_time(event) for event in undisturbed]


def test_a_client_says_how_many_rows_it_has_and_then_it_is_as_many() -> None:
    update = an_update()  # of 40 rows
    for known in (0, 40):
        validate_rows(update.num_examples, ClientProfile(11, 4, 3, known))
    with pytest.raises(InvalidMessage, match="update claims 40 rows; the client has 39"):
        validate_rows(update.num_examples, ClientProfile(11, 4, 3, 39))


def without_time(event: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in event.items() if "seconds" not in name}


class Noted:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.progress: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def start_client(self, round_number: int, name: str, active_experts: int) -> None:
        self.progress.append(f"{name} begins round {round_number} with k={active_experts}")

    def end_client(self, name: str) -> None:
        self.progress.append(f"{name} has answered")

    def step(self, tokens: int) -> None:
        self.progress.append("step")


def test_who_watches_is_told_of_every_client_step_and_score(tiny_folder: Path, tmp_path: Path) -> None:
    noted = Noted()

    @contextmanager
    def watch(_: object) -> Iterator[Reporter]:
        yield noted

    config = tiny_config(tiny_folder, tmp_path / "run", "server.num_server_rounds=1")
    run_experiment(prepare(config, "refuse"), config_text="", workers=1, watch=watch)
    expected = []
    for event in events(tmp_path / "run", "client"):
        name, k = f"client {event['client']}", event["active_experts"]
        expected += [f"{name} begins round 1 with k={k}", "step", "step", f"{name} has answered"]
    assert noted.progress == expected and len(expected) == 12
    scored = [text.partition(": loss ")[0] for text in noted.messages if "global model" in text]
    assert scored == [f"round {number}: global model at k={k}" for number in (0, 1) for k in (4, 2, 1)]
