"""Asking a trainer that is away, slow, silent or out of its mind."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedflame.errors import InvalidMessage
from fedflame.trainer.ask import answer_pieces, ask
from fedflame.trainer.unix_socket import listening
from fedflame.wire.envelope import Envelope, receive, send_pieces

pytestmark = pytest.mark.timeout(30)
REQUEST = Envelope({"kind": "describe", "ticket": "t", "run": "r", "site": "north"}, b"body")
ANSWER = Envelope({"kind": "description"}, b"answer")
Manner = Callable[[socket.socket], object]
"""What a trainer does with a connection before it closes it."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.trainer.ask.RETRY_SECONDS", 0.02)


def answers(connection: socket.socket) -> None:
    assert receive(connection) == REQUEST
    send_pieces(connection, ANSWER.pieces())


def hangs_up(connection: socket.socket) -> None:
    receive(connection)


def hangs_up_within_its_answer(connection: socket.socket) -> None:
    receive(connection)
    connection.sendall(ANSWER.to_bytes()[:-1])


def is_silent(connection: socket.socket) -> None:
    receive(connection)
    connection.recv(1)  # until the other side has gone


@contextmanager
def a_trainer(path: Path, *manners: Manner, away: float = 0.0) -> Iterator[list[str]]:
    """Deals with one connection after another, and notes how; the door opens after `away` seconds."""
    seen: list[str] = []
    opened = threading.Event()

    def work() -> None:
        time.sleep(away)
        with listening(path) as listener:
            opened.set()
            for manner in manners:
                connection, _ = listener.accept()
                with connection:
                    manner(connection)
                seen.append(getattr(manner, "__name__", ""))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if not away:
        opened.wait(10)
    yield seen
    thread.join(10)
    assert not thread.is_alive(), "it was asked as often as it was ready to be"


def test_a_trainer_that_comes_back_in_time_is_asked(tmp_path: Path) -> None:
    with a_trainer(tmp_path / "s", answers, away=0.2) as seen:
        assert ask(tmp_path / "s", REQUEST, patience=20) == ANSWER
    assert seen == ["answers"]


def test_a_trainer_that_ends_while_it_works_is_asked_again(tmp_path: Path) -> None:
    with a_trainer(tmp_path / "s", hangs_up, hangs_up_within_its_answer, answers) as seen:
        assert ask(tmp_path / "s", REQUEST, patience=20) == ANSWER
    assert seen == ["hangs_up", "hangs_up_within_its_answer", "answers"]


@pytest.mark.slow
def test_the_time_that_it_works_is_no_time_that_it_is_away(tmp_path: Path) -> None:
    def works_and_hangs_up(connection: socket.socket) -> None:
        hangs_up(connection)
        time.sleep(0.6)

    with a_trainer(tmp_path / "s", works_and_hangs_up, answers):
        assert ask(tmp_path / "s", REQUEST, patience=0.5) == ANSWER


def test_a_trainer_that_stays_away_is_given_up_once_patience_is_at_its_end(tmp_path: Path) -> None:
    gc.collect()  # sockets of earlier tests would otherwise be closed in this one
    start, before = time.monotonic(), os.listdir("/dev/fd")
    with pytest.raises(OSError, match=r"no trainer at .*/s for 0 s: .*No such file"):
        ask(tmp_path / "s", REQUEST, patience=0.3)
    assert 0.3 <= time.monotonic() - start < 5
    assert os.listdir("/dev/fd") == before, "no connection is left open"


def test_without_patience_a_trainer_is_asked_once(tmp_path: Path) -> None:
    with a_trainer(tmp_path / "s", hangs_up, answers) as seen:
        with pytest.raises(OSError, match=r"no trainer at .*/s: the connection ended"):
            ask(tmp_path / "s", REQUEST, patience=0)
        assert seen in ([], ["hangs_up"])
        assert ask(tmp_path / "s", REQUEST, patience=20) == ANSWER
    assert seen == ["hangs_up", "answers"]


def test_a_trainer_that_is_away_is_looked_for_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []

    def nobody(path: Path) -> socket.socket:
        looked.append(path)
        raise FileNotFoundError

    monkeypatch.setattr("fedflame.trainer.ask._connected", nobody)
    monkeypatch.setattr("fedflame.trainer.ask.RETRY_SECONDS", 0.1)
    with pytest.raises(OSError):
        ask(tmp_path / "s", REQUEST, patience=0.25)
    assert 2 <= len(looked) <= 4


def test_an_answer_may_take_longer_than_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.trainer.ask.CONNECT_SECONDS", 0.1)

    def answers_slowly(connection: socket.socket) -> None:
        time.sleep(0.4)
        answers(connection)

    with a_trainer(tmp_path / "s", answers_slowly) as seen:
        assert ask(tmp_path / "s", REQUEST, patience=0) == ANSWER
    assert seen == ["answers_slowly"]


def test_a_trainer_that_is_silent_for_too_long_is_not_asked_again(tmp_path: Path) -> None:
    with a_trainer(tmp_path / "s", is_silent) as seen, pytest.raises(TimeoutError):
        ask(tmp_path / "s", REQUEST, patience=20, timeout=0.1)
    assert seen == ["is_silent"]


def test_a_door_at_which_nobody_is_let_in_is_no_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trainer hangs, and others wait before the door already."""
    monkeypatch.setattr("fedflame.trainer.ask.CONNECT_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting:
            waiting.connect(str(tmp_path / "s"))
            with pytest.raises(OSError):
                ask(tmp_path / "s", REQUEST, patience=0)


def test_what_goes_wrong_is_an_answer_too_and_says_to_what(tmp_path: Path) -> None:
    def is_mad(connection: socket.socket) -> None:
        receive(connection)
        connection.sendall(b"nonsense" * 10)

    with a_trainer(tmp_path / "s", is_mad, is_mad):
        with pytest.raises(InvalidMessage, match="no envelope"):
            ask(tmp_path / "s", REQUEST, patience=0)
        answer = Envelope.from_bytes(b"".join(answer_pieces(tmp_path / "s", REQUEST.pieces(), patience=0)))
    echoed = {"ticket": "t", "run": "r", "site": "north"}
    assert answer.header == {"kind": "failed", "reason": "bytes that are no envelope", **echoed}


def test_a_request_that_is_no_envelope_is_not_even_sent(tmp_path: Path) -> None:
    answer = Envelope.from_bytes(b"".join(answer_pieces(tmp_path / "s", [b"garbage"], patience=0)))
    assert answer.header == {"kind": "failed", "reason": "the request: 7 bytes that are no envelope"}
