"""Workers that are told to end, or are wanted no longer: none is left behind, and none ends too early."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
from tests.clients.workers_asked import all_at_rest, others_at_work, plan

from fedflame.clients.fork_server import SIGNALS
from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerClients, WorkerSetup

pytestmark = pytest.mark.slow


@pytest.mark.timeout(120)
def test_a_stream_that_is_left_leaves_no_worker_at_work(local: LocalClients, workers: WorkerClients) -> None:
    stepped: list[int] = []
    answers = workers.train([plan(local, 0, steps=1), plan(local, 1, steps=100_000)], stepped.append)
    next(answers)
    start, before = time.monotonic(), len(multiprocessing.active_children())
    answers.close()
    assert len(multiprocessing.active_children()) == before - 1 and time.monotonic() - start < 8
    list(workers.train([plan(local, 0)], stepped.append))
    assert len(multiprocessing.active_children()) == before, "the next stream has all workers again"


@pytest.mark.timeout(120)
def test_workers_that_are_not_wanted_any_longer_do_not_load_the_model_first(
    setup: WorkerSetup, local: LocalClients
) -> None:
    before = set(multiprocessing.active_children())
    with WorkerClients(local, [setup]):
        start = time.monotonic()
    assert time.monotonic() - start < 1.5 and set(multiprocessing.active_children()) <= before


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", SIGNALS)
def test_a_signal_which_reaches_all_processes_ends_no_worker(
    end: signal.Signals, local: LocalClients, workers: WorkerClients
) -> None:
    def interrupt(tokens: int) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, end)

    order = (3, 4, 2)
    got = list(workers.train([plan(local, client) for client in order], interrupt))
    expected = list(local.train([plan(local, client) for client in order], lambda _: None))
    assert [answer.update for answer in got] == [answer.update for answer in expected]


@pytest.mark.timeout(120)
def test_ctrl_c_ends_the_client_of_this_process_and_those_of_the_others(
    local: LocalClients, workers: WorkerClients
) -> None:
    def interrupt(tokens: int) -> None:
        assert len(others_at_work(workers)) == 2
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        list(workers.train([plan(local, client, steps=10_000) for client in (0, 1, 2)], interrupt))
    assert multiprocessing.active_children() == []


@pytest.mark.timeout(120)
def test_a_worker_ends_with_its_connection_whether_it_loads_rests_or_works(
    local: LocalClients, setup: WorkerSetup
) -> None:
    """As it does where the main process is killed."""
    with WorkerClients(local, [setup, setup]) as clients:
        all_at_rest(clients)
        resting, working = clients._workers.values()
        clients._workers = {}
        clients._start_missing()
        loading = list(clients._workers.values())
        clients._workers = {}
    working.connection.send_bytes(plan(local, 0, steps=20)[1])
    assert isinstance(working.connection.recv(), int)
    for worker in (resting, working, *loading):
        worker.connection.close()
        worker.process.join(30)
        assert worker.process.exitcode == 0
