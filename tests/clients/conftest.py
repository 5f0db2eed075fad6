"""Five clients of a tiny model, in this process and with two others that have loaded it."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.clients.workers_asked import CLIENTS, all_at_rest
from tests.random_rows import random_rows
from tests.tiny_models import VOCABULARY, character_tokenizer

from fedflame.base.adapted import load_adapted_model
from fedflame.clients.local import LocalClients
from fedflame.clients.workers import WorkerClients, WorkerSetup
from fedflame.config.sections import AdapterConfig
from fedflame.data.client_tests import encode_tests
from fedflame.data.conversations import single_turn
from fedflame.data.encoder import new_encoder
from fedflame.training.error_feedback import Residuals
from fedflame.training.evaluation import HeldOut
from fedflame.training.score_tests import rows_to_score


@pytest.fixture(scope="module")
def setup(tiny_folder: Path) -> WorkerSetup:
    """Five clients with rows of their own."""
    rows = [random_rows([12] * (3 + client), VOCABULARY, client, prompt=5) for client in range(CLIENTS)]
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
