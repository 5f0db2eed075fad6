from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from tests.tiny_models import VOCABULARY, character_tokenizer

from fedflame.base.adapted import load_adapted_model
from fedflame.base.device import Card, DeviceChoice
from fedflame.clients.answers import OnStep
from fedflame.clients.fork_server import SIGNALS
from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerClients, WorkerSetup, _Worker, worker_devices
from fedflame.config.sections import AdapterConfig
from fedflame.data.client_tests import encode_tests
from fedflame.data.conversations import single_turn
from fedflame.data.encoder import new_encoder
from fedflame.data.encoding import EncodedRow
from fedflame.errors import OutOfMemory, UserError
from fedflame.messages import EvaluationPlan, RoundPlan
from fedflame.training.error_feedback import Residuals
from fedflame.training.evaluation import HeldOut
from fedflame.training.score_tests import rows_to_score
from fedflame.wire.codec import decode_evaluation, encode_plan

pytestmark = pytest.mark.slow

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
        device="cpu",
        rows=rows,
        pad_token_id=0,
        residuals=Residuals(Path("never-written")),
        threads=torch.get_num_threads(),
        tests=[_to_score(client) for client in range(CLIENTS)],
    )


def _to_score(client: int) -> HeldOut:
    texts = [f"{client}{number}" for number in range(1 + client)]
    rows = [single_turn(text, "", text, "all") for text in texts]
    encoder = new_encoder(character_tokenizer(), 60)
    tests, _ = encode_tests(rows, encoder, None, generate=True)
    return rows_to_score(tests, encoder)


@pytest.fixture(scope="module")
def local(setup: WorkerSetup) -> LocalClients:
    adapted, _ = load_adapted_model(setup.model_name_or_path, setup.dtype, setup.adapter)
    return LocalClients(adapted, setup.rows, setup.pad_token_id, setup.residuals, tests=setup.tests)


@pytest.fixture(scope="module")
def three(setup: WorkerSetup, local: LocalClients) -> Iterator[WorkerClients]:
    # A shell's background jobs ignore SIGINT, and their children inherit it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with WorkerClients(local, [setup, setup]) as clients:
        yield clients
    signal.signal(signal.SIGINT, before)
    assert multiprocessing.active_children() == []


@pytest.fixture
def workers(three: WorkerClients) -> WorkerClients:
    """This process and two others that have loaded the base and rest."""
    three._start_missing()
    all_at_rest(three)
    return three


def all_at_rest(clients: WorkerClients) -> None:
    while not all(worker.ready for worker in clients._workers.values()):
        clients._listen(lambda _: None, timeout=30)


def others_at_work(clients: WorkerClients) -> list[_Worker]:
    return [worker for worker in clients._workers.values() if worker.asked]


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
            lora_dropout=0.2,  # masks follow from the plan, not from who draws them
            router_aux_loss_coef=0.1,
        )
    )


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
