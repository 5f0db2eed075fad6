"""Clients and workers that raise, are killed or fill the memory: a failure, or one line that ends the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import NoReturn

import pytest
import torch
from tests.clients.workers_asked import CLIENTS, all_at_rest, others_at_work, plan

from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerClients, WorkerSetup
from fedflame.data.encoding import EncodedRow
from fedflame.errors import OutOfMemory, UserError

pytestmark = pytest.mark.slow


@pytest.mark.timeout(120)
def test_a_client_that_raises_is_a_failure_and_the_others_go_on(
    local: LocalClients, workers: WorkerClients
) -> None:
    broken = [plan(local, 1), plan(local, CLIENTS), (0, b"nonsense"), plan(local, 2)]
    answers = list(workers.train([*broken, *broken], lambda _: None))
    assert [bool(answer.update) for answer in answers] == [True, False, False, True] * 2
    for first in (0, 4):
        assert answers[first + 1].failure == "IndexError: list index out of range"
        assert answers[first + 2].failure == "8 bytes that are no fedflame message"


@pytest.mark.timeout(120)
def test_an_error_of_whoever_gives_the_plans_is_no_failure_of_a_client(
    local: LocalClients, workers: WorkerClients
) -> None:
    """Also where the plan is made between the steps of a client of this process."""

    def plans() -> Iterator[tuple[int, bytes]]:
        yield plan(local, 0, steps=10_000)
        yield plan(local, 1)
        yield plan(local, 2)
        raise LookupError("no plan")

    with pytest.raises(LookupError, match="no plan"):
        list(workers.train(plans(), lambda _: None))
    assert others_at_work(workers) == []


def test_an_error_of_whoever_is_told_of_a_step_is_no_failure_of_a_client(local: LocalClients) -> None:
    def tell(tokens: int) -> None:
        raise LookupError("told")

    with pytest.raises(LookupError, match="told"):
        list(local.train([plan(local, 0)], tell))


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_while_it_rests_is_replaced_and_no_client_fails(
    local: LocalClients, workers: WorkerClients
) -> None:
    killed = [worker.process for worker in workers._workers.values()]
    for process in killed:
        process.kill()
        process.join(30)
    answers = list(workers.train([plan(local, 0), plan(local, 1)], lambda _: None))
    assert [answer.failure for answer in answers] == ["", ""]
    all_at_rest(workers)
    assert {worker.process for worker in workers._workers.values()}.isdisjoint(killed)


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_before_it_takes_its_plan_is_a_failure(
    local: LocalClients, workers: WorkerClients
) -> None:
    def plans() -> Iterator[tuple[int, bytes]]:
        yield plan(local, 0, steps=50)
        for worker in workers._workers.values():
            worker.process.kill()
            worker.process.join(30)
        yield plan(local, 1)

    answers = list(workers.train(plans(), lambda _: None))
    assert [answer.failure for answer in answers] == ["", "its worker process ended with exit code -9"]


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_while_it_loads_the_model_ends_the_run_in_one_line(
    setup: WorkerSetup, local: LocalClients
) -> None:
    """No client has failed, and another process would end like this one: mostly memory is short."""
    with WorkerClients(local, [setup]) as clients:
        (loading,) = clients._workers.values()
        loading.process.kill()
        with pytest.raises(UserError) as ended:
            list(clients.train([plan(local, 0, steps=10_000)], lambda _: None))
    assert str(ended.value) == (
        "a worker process ended with exit code -9 while it loaded the model; fewer workers take less memory"
    )


@pytest.mark.timeout(120)
def test_a_worker_that_cannot_load_the_model_ends_the_run_with_its_reason(
    setup: WorkerSetup, local: LocalClients
) -> None:
    lost = replace(setup, model_name_or_path="/no/such/folder")
    with (
        WorkerClients(local, [lost]) as clients,
        pytest.raises(UserError, match="no/such/folder"),
    ):
        list(clients.train([plan(local, 0, steps=10_000)], lambda _: None))


@pytest.mark.timeout(120)
def test_a_worker_that_is_killed_at_work_is_a_failure_and_is_replaced(
    local: LocalClients, workers: WorkerClients
) -> None:
    killed: list[int] = []

    def kill_once(tokens: int) -> None:
        if not killed:
            killed.extend(worker.process.pid or 0 for worker in others_at_work(workers))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    answers = list(workers.train([plan(local, client, steps=100) for client in (0, 1, 2)], kill_once))
    assert len(killed) == 2
    assert [answer.failure for answer in answers] == ["", *["its worker process ended with exit code -9"] * 2]
    assert answers[0].update and len(multiprocessing.active_children()) == 2, "they have been replaced"
    all_at_rest(workers)
    order = (3, 0, 1)
    again = list(workers.train([plan(local, client) for client in order], lambda _: None))
    expected = list(local.train([plan(local, client) for client in order], lambda _: None))
    assert [answer.update for answer in again] == [answer.update for answer in expected]


FULL = (
    "cpu ran out of memory while training at k = {} with 2 rows per batch and gradient_checkpointing = 'none'"
    "; take gradient_checkpointing = 'experts' or 'layers', fewer tokens per batch, a smaller adapter.r, or "
    "a device with more memory"
)


class TooLarge(list[EncodedRow]):
    """Rows of a client whose batches do not fit the memory."""

    def __getitem__(self, index: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.\nGPU 0 has")


def test_a_client_that_fills_the_memory_ends_the_run_in_one_line(local: LocalClients) -> None:
    rows = [TooLarge(rows) if client == 1 else rows for client, rows in enumerate(local.rows)]
    answers = replace(local, rows=rows).train([plan(local, 0), plan(local, 1)], lambda _: None)
    assert next(answers).update
    with pytest.raises(OutOfMemory) as full:
        next(answers)
    assert str(full.value) == FULL.format(2)


@pytest.mark.timeout(120)
def test_a_client_that_fills_the_memory_of_another_process_ends_the_run_in_the_same_line(
    local: LocalClients, setup: WorkerSetup
) -> None:
    small = replace(setup, rows=[TooLarge(rows) for rows in setup.rows])
    with WorkerClients(local, [small]) as clients:
        all_at_rest(clients)
        with pytest.raises(OutOfMemory) as full:
            list(clients.train([plan(local, 0, steps=10_000), plan(local, 2)], lambda _: None))
    assert str(full.value) == FULL.format(3)
