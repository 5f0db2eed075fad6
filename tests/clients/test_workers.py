"""Worker processes: the bytes of one process in the order of the plans, and who trains what where."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.clients.workers_asked import CLIENTS, all_at_rest, plan

from fedflame.base.device import Card, DeviceChoice
from fedflame.clients.answers import OnStep
from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerClients, WorkerSetup, worker_devices
from fedflame.errors import UserError
from fedflame.messages import EvaluationPlan
from fedflame.wire.codec import decode_evaluation, encode_plan

pytestmark = pytest.mark.slow


@pytest.mark.timeout(120)
@pytest.mark.parametrize("others", [1, 2])
def test_answers_have_the_bytes_of_one_process_and_the_order_of_the_plans(
    others: int, local: LocalClients, setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [3, 0, 4, 2, 1, 0, 2]
    tokens: list[int] = []
    told: list[int] = []
    expected = list(local.train([plan(local, client) for client in order], told.append))
    here: list[bytes] = []
    answer = LocalClients.answer

    def noted(self: LocalClients, message: bytes, on_step: OnStep) -> object:
        here.append(message)
        return answer(self, message, on_step)

    monkeypatch.setattr(LocalClients, "answer", noted)
    with WorkerClients(local, [setup] * others) as workers:
        all_at_rest(workers)
        assert len(multiprocessing.active_children()) == others, "this process is a worker, too"
        answers = list(workers.train([plan(local, client) for client in order], tokens.append))
        assert len(multiprocessing.active_children()) == others, "workers train one client after another"
    assert 1 <= len(here) <= len(order) - others, "all processes train, this one among them"
    assert [answer.update for answer in answers] == [answer.update for answer in expected]
    assert len({answer.update for answer in answers}) == CLIENTS
    assert {answer.failure for answer in answers} == {""}
    assert sorted(tokens) == sorted(told) and len(told) == 2 * len(order), "every step was told"


@pytest.mark.timeout(120)
def test_scores_have_the_bytes_of_one_process(local: LocalClients, workers: WorkerClients) -> None:
    layers = len(local.adapted.layers)
    plans = [
        (client, encode_plan(EvaluationPlan(
            round=1, client=client, active_experts=1 + client % 3, rescaler_values=torch.ones(layers),
            adapter=local.adapted.initial_adapter(client), max_new_tokens=2,
        )))
        for client in (4, 0, 3, 1, 2)
    ]  # fmt: skip
    expected = [answer.update for answer in local.evaluate(plans)]
    assert [answer.update for answer in workers.evaluate(plans)] == expected
    told = [decode_evaluation(update) for update in expected]
    assert [(one.client, one.rows) for one in told] == [(4, 5), (0, 1), (3, 4), (1, 2), (2, 3)]
    assert workers.test_rows() == [1, 2, 3, 4, 5] and all(one.rouge_l_sum is not None for one in told)


@pytest.mark.timeout(120)
def test_the_others_get_plans_while_this_process_trains_but_no_more_than_twice_the_workers(
    local: LocalClients, workers: WorkerClients
) -> None:
    taken = []

    def plans() -> Iterator[tuple[int, bytes]]:
        for client in [0, 1, 2, 3, 4] * 3:
            taken.append(client)
            yield plan(local, client, steps=2 if taken[1:] else 80)  # all others wait for the first

    answers = workers.train(plans(), lambda _: time.sleep(0.03))
    assert next(answers).update
    assert len(taken) == 6
    answers.close()


@pytest.mark.timeout(120)
def test_a_worker_that_takes_more_steps_than_this_process_is_not_heard_late(
    local: LocalClients, setup: WorkerSetup
) -> None:
    """It takes 40 steps while this process takes 15 that wait, and then gets the third plan."""
    taken = []

    def plans() -> Iterator[tuple[int, bytes]]:
        for client, steps in ((0, 15), (1, 40), (2, 1)):
            taken.append(client)
            yield plan(local, client, steps)

    with WorkerClients(local, [setup]) as clients:
        all_at_rest(clients)
        answers = clients.train(plans(), lambda _: time.sleep(0.05))
        next(answers)
        assert taken == [0, 1, 2]
        answers.close()


@pytest.mark.timeout(120)
def test_without_others_that_have_loaded_the_base_this_process_trains_alone(
    local: LocalClients, setup: WorkerSetup
) -> None:
    with WorkerClients(local, [setup]) as clients:
        (loading,) = clients._workers.values()
        assert loading.process.pid is not None
        os.kill(loading.process.pid, signal.SIGSTOP)
        order = [0, 1, 2]
        try:
            answers = list(clients.train([plan(local, client) for client in order], lambda _: None))
        finally:
            os.kill(loading.process.pid, signal.SIGCONT)
    assert [answer.update for answer in answers] == [
        answer.update for answer in local.train([plan(local, client) for client in order], lambda _: None)
    ]


@pytest.mark.parametrize(
    ("cards", "count", "expected"),
    [
        ((), 3, ["cpu", "cpu", "cpu"]),
        (("cuda:1",), 2, ["cuda:1", "cuda:1"]),
        (("cuda:0", "cuda:1"), 2, ["cuda:0", "cuda:1"]),
        (("cuda:0", "cuda:1", "cuda:2"), 2, ["cuda:0", "cuda:1"]),
        (("cuda:0", "cuda:1"), 5, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
    ],
)
def test_workers_take_the_cards_in_turn(cards: tuple[str, ...], count: int, expected: list[str]) -> None:
    name = cards[0] if cards else "cpu"
    choice = DeviceChoice(name, "", tuple(Card(card, "card", 1, (9, 0)) for card in cards))
    assert worker_devices(choice, count) == expected


@pytest.mark.timeout(120)
def test_each_other_process_loads_the_base_onto_its_own_device(
    local: LocalClients, setup: WorkerSetup
) -> None:
    elsewhere = replace(setup, device="nowhere")
    with (
        WorkerClients(local, [setup, elsewhere]) as clients,
        pytest.raises(UserError, match=r"cannot be loaded: .*nowhere"),
    ):
        list(clients.train([plan(local, 0, steps=10_000)], lambda _: None))
