"""The trainer's server at a unix socket, which answers only processes of the same user."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedflame.errors import InvalidMessage, UserError
from fedflame.folder_lock import sole_user
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import TRAINER_LOCK, Site
from fedflame.trainer.unix_socket import same_user
from fedflame.wire.envelope import receive, send

MOST_CONNECTIONS = 16
"""Each may hold a plan in memory while it waits for the training of another."""


@contextmanager
def sole_trainer(site: Site) -> Iterator[None]:
    """Hold the site's lock within the block, so that only one trainer serves the site.

    Raises:
        UserError: another trainer holds the lock, or the state folder cannot be written.
    """
    lock = site.state_path / TRAINER_LOCK
    try:
        site.state_path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"{site.state_path}: cannot be made: {error.strerror}") from error
    with sole_user(lock, f"{site.state_path}: another trainer serves {site.name} already"):
        yield


def serve(listener: socket.socket, service: TrainerService, say: Callable[[str], None]) -> None:
    """Answer all connections, each in a thread of its own, until the listener is closed.

    A connection beyond `MOST_CONNECTIONS` is closed at once, and whoever asks tries again.
    """
    room = threading.BoundedSemaphore(MOST_CONNECTIONS)
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        if room.acquire(blocking=False):
            threading.Thread(target=_converse, args=(connection, room, service, say), daemon=True).start()
        else:
            say(f"refused: a connection beside {MOST_CONNECTIONS} others")
            connection.close()


def _converse(
    connection: socket.socket,
    room: threading.BoundedSemaphore,
    service: TrainerService,
    say: Callable[[str], None],
) -> None:
    """Answer requests on one connection until it ends, and make room for another."""
    try:
        with connection:
            if not same_user(connection):
                say("refused: a connection of another user")
                return
            while True:
                answer = service.answer(receive(connection, service.longest_request))
                send(connection, answer.header, answer.body)
    except InvalidMessage as error:
        say(f"refused: {error}")
    except (EOFError, OSError):
        return
    finally:
        room.release()
