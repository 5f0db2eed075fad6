from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiny_models import VOCABULARY

from fedflame.base.adapted import load_adapted_model
from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerClients, WorkerSetup
from fedflame.config.sections import AdapterConfig
from fedflame.data.encoding import EncodedRow
from fedflame.messages import RoundPlan
from fedflame.training.error_feedback import Residuals
from fedflame.wire.codec import encode_plan

CLIENTS = 5


@pytest.fixture(scope="module")
def setup(tiny_folder: Path) -> WorkerSetup:
    """Five clients with rows of their own."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for client in range(CLIENTS):
        ids = torch.randint(3, VOCABULARY, (3 + client, 12), generator=generator).tolist()
        rows.append([EncodedRow(row, 5, False) for row in ids])
    return WorkerSetup(
        model_name_or_path=str(tiny_folder),
        dtype="float32",
        adapter=AdapterConfig(r=3),
        gradient_checkpointing="none",
        rows=rows,
        pad_token_id=0,
        residuals=Residuals(Path("never-written")),
        threads=torch.get_num_threads(),
    )


@pytest.fixture(scope="module")
def local(setup: WorkerSetup) -> LocalClients:
    adapted, _ = load_adapted_model(setup.model_name_or_path, setup.dtype, setup.adapter)
    return LocalClients(adapted, setup.rows, setup.pad_token_id, setup.residuals)


@pytest.fixture(scope="module")
def workers(setup: WorkerSetup) -> Iterator[WorkerClients]:
    # A shell's background jobs ignore SIGINT, and their children inherit it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with WorkerClients(setup, 2) as clients:
        yield clients
    signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []


def plan(local: LocalClients, client: int, steps: int = 2) -> tuple[int, bytes]:
    adapted = local.adapted
    return client, encode_plan(
        RoundPlan(
            round=1,
            client=client,
            seed=0,
            active_experts=1 + client % 3,
            rescaler="learned",
            rescaler_values=torch.ones(len(adapted.layers)),
            adapter=adapted.initial_adapter(0),
            learning_rate=0.01,
            weight_decay=0.0,
            batch_size=2,
            max_steps=steps,
        )
    )


@pytest.mark.timeout(120)
def test_answers_have_the_bytes_of_one_process_and_the_order_of_the_plans(
    local: LocalClients, workers: WorkerClients
) -> None:
    order = [3, 0, 4, 2, 1, 0]
    tokens: list[int] = []
    told: list[int] = []
    expected = list(local.train([plan(local, client) for client in order], told.append))
    answers = list(workers.train([plan(local, client) for client in order], tokens.append))
    assert [answer.update for answer in answers] == [answer.update for answer in expected]
    assert len({answer.update for answer in answers}) == CLIENTS
    assert {answer.failure for answer in answers} == {""}
    assert sorted(tokens) == sorted(told) and len(told) == 2 * len(order), "every step was told"
    assert len(multiprocessing.active_children()) == 2, "workers train one client after another"


@pytest.mark.timeout(120)
def test_plans_are_taken_when_they_are_needed(local: LocalClients, workers: WorkerClients) -> None:
    taken = []

    def plans() -> Iterator[tuple[int, bytes]]:
        for client in [0, 1, 2, 3, 4] * 3:
            taken.append(client)
            yield plan(local, client, steps=2 if taken[1:] else 100)  # all others wait for the first

    answers = workers.train(plans(), lambda _: None)
    next(answers)
    assert len(taken) <= 4, "twice the workers at most are out"
    answers.close()


@pytest.mark.timeout(120)
def test_a_client_that_raises_is_a_failure_and_the_others_go_on(
    local: LocalClients, workers: WorkerClients
) -> None:
    broken = [plan(local, 1), plan(local, CLIENTS), (0, b"nonsense"), plan(local, 2)]
    answers = list(workers.train(broken, lambda _: None))
    assert [bool(answer.update) for answer in answers] == [True, False, False, True]
    assert answers[1].failure == "IndexError: list index out of range"
    assert answers[2].failure == "8 bytes that are no fedflame message"


@pytest.mark.timeout(120)
def test_a_stream_that_is_left_leaves_no_worker_at_work(local: LocalClients, workers: WorkerClients) -> None:
    stepped: list[int] = []
    answers = workers.train([plan(local, 0, steps=1), plan(local, 1, steps=100_000)], stepped.append)
    next(answers)
    start, before = time.monotonic(), len(multiprocessing.active_children())
    answers.close()
    assert len(multiprocessing.active_children()) == before - 1 and time.monotonic() - start < 8


@pytest.mark.timeout(120)
def test_workers_that_are_not_wanted_any_longer_do_not_load_the_model_first(setup: WorkerSetup) -> None:
    before = set(multiprocessing.active_children())
    with WorkerClients(setup, 1):
        start = time.monotonic()
    assert time.monotonic() - start < 1.5 and set(multiprocessing.active_children()) <= before


@pytest.mark.timeout(120)
def test_ctrl_c_which_reaches_all_processes_ends_no_worker(
    local: LocalClients, workers: WorkerClients
) -> None:
    def interrupt(tokens: int) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGINT)

    (got,) = workers.train([plan(local, 3)], interrupt)
    (expected,) = local.train([plan(local, 3)], lambda _: None)
    assert got.update == expected.update


@pytest.mark.timeout(120)
def test_a_worker_ends_with_its_connection_whether_it_rests_or_works(
    local: LocalClients, workers: WorkerClients
) -> None:
    """As it does where the main process is killed."""
    list(workers.train([plan(local, 0), plan(local, 1)], lambda _: None))
    resting, working = workers._idle
    workers._idle = []
    working.connection.send_bytes(plan(local, 0, steps=20)[1])
    assert isinstance(working.connection.recv(), int)
    for worker in (resting, working):
        worker.connection.close()
        worker.process.join(30)
        assert worker.process.exitcode == 0


@pytest.mark.timeout(120)
def test_a_worker_that_was_killed_before_it_took_its_plan_is_a_failure(
    setup: WorkerSetup, local: LocalClients
) -> None:
    """While it rests, and while it loads the model with the plan before its door."""
    with WorkerClients(setup, 1) as clients:
        (loading,) = clients._idle
        assert loading.process.pid is not None
        os.kill(loading.process.pid, signal.SIGSTOP)  # so that it cannot be quicker than what kills it
        killer = threading.Timer(0.2, loading.process.kill)
        killer.start()
        (answer,) = clients.train([plan(local, 0)], lambda _: None)
        assert answer.failure == "its worker process ended with exit code -9"
        resting = clients._start()
        resting.process.kill()
        resting.process.join(30)
        clients._idle.append(resting)
        (answer,) = clients.train([plan(local, 0)], lambda _: None)
        assert answer.failure == "its worker process ended with exit code -9"


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_is_a_failure_and_is_replaced(
    local: LocalClients, workers: WorkerClients
) -> None:
    killed: list[int] = []

    def kill_once(tokens: int) -> None:
        if not killed:
            killed.extend(child.pid or 0 for child in multiprocessing.active_children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    answers = list(workers.train([plan(local, client, steps=200) for client in (0, 1)], kill_once))
    assert [answer.update for answer in answers] == [b"", b""]
    assert {answer.failure for answer in answers} == {"its worker process ended with exit code -9"}
    (again,) = workers.train([plan(local, 3)], lambda _: None)
    (expected,) = local.train([plan(local, 3)], lambda _: None)
    assert again.update == expected.update
