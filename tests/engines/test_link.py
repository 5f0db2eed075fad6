"""The engine's end of the driver's socket, one word at a time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedflame.engines.link import HubLink
from fedflame.trainer.unix_socket import listening
from fedflame.wire.envelope import Envelope, receive, send

pytestmark = pytest.mark.timeout(60)


@contextmanager
def a_link(tmp_path: Path) -> Iterator[tuple[HubLink, socket.socket]]:
    """The engine's end and the driver's, after the hello."""
    with listening(tmp_path / "hub.sock") as listener:
        link = HubLink(tmp_path / "hub.sock", "key")
        connection, _ = listener.accept()
        with connection:
            assert receive(connection).header == {"kind": "hello", "job_key": "key"}
            yield link, connection
        link.close()


def carried(ticket: str, longest_answer: Any = 100) -> dict[str, Any]:
    return {"kind": "carry", "ticket": ticket, "site": "north", "longest_answer": longest_answer}


def test_requests_come_as_they_were_sent_until_the_driver_hangs_up(tmp_path: Path) -> None:
    with a_link(tmp_path) as (link, connection):
        for number in range(3):
            send(connection, carried(f"t{number}"), b"one", b"more")
        connection.shutdown(socket.SHUT_RDWR)
        requests = link.requests()
        assert [requests.get() for _ in range(4)] == [
            *((f"t{number}", "north", b"onemore") for number in range(3)),
            None,
        ]


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense" * 10,
        Envelope({"kind": "end"}).to_bytes(),
        b"flame",
        Envelope(carried("t", "100")).to_bytes(),
        Envelope(carried("t", True)).to_bytes(),
        Envelope(carried("t") | {"ticket": ["t"]}).to_bytes(),
        Envelope(carried("t") | {"kind": "end"}).to_bytes(),
    ],
)
def test_what_is_no_request_is_the_end(said: bytes, tmp_path: Path) -> None:
    with a_link(tmp_path) as (link, connection):
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        assert link.next_request() is None


def test_a_link_that_is_closed_has_no_request(tmp_path: Path) -> None:
    with a_link(tmp_path) as (link, connection):
        requests = link.requests()
        link.close()
        assert requests.get() is None and link.next_request() is None
        assert connection.recv(1) == b"", "the driver sees the end"
        link.close()


def test_an_answer_that_is_longer_than_any_to_its_request_is_not_sent_on(tmp_path: Path) -> None:
    with a_link(tmp_path) as (link, connection):
        send(connection, carried("t"))
        assert link.next_request() == ("t", "north", b"")
        link.answered("t", "north", bytes(60), bytes(40))
        assert receive(connection).body == bytes(100)
        link.answered("t", "north", bytes(60), bytes(41))
        link.answered("never carried", "north", b"x")
        for ticket, size, longest in (("t", 101, 100), ("never carried", 1, 0)):
            reason = f"{size} bytes; an answer to this request has at most {longest}"
            header = {"kind": "oversized", "ticket": ticket, "site": "north", "reason": reason}
            assert receive(connection) == Envelope(header)


def test_answers_of_several_threads_come_whole(tmp_path: Path) -> None:
    """Of pieces that are longer than the socket holds, so that no piece is sent at once."""
    pieces, threads = 3, 4
    with a_link(tmp_path) as (link, connection):
        for n in range(threads):
            send(connection, carried(f"t{n}", 500_000 * pieces))
            assert link.next_request() == (f"t{n}", "north", b"")
        senders = [
            threading.Thread(target=link.answered, args=(f"t{n}", "north", *[bytes([n]) * 500_000] * pieces))
            for n in range(threads)
        ]
        for sender in senders:
            sender.start()
        got = {answer.header["ticket"]: answer.body for answer in (receive(connection) for _ in senders)}
        for sender in senders:
            sender.join()
    assert got == {f"t{n}": bytes([n]) * 500_000 * pieces for n in range(threads)}
