"""The socket of a trainer: who may ask at it, and what comes of nonsense, crowds and who hangs up."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.engines_here import write_site
from tests.trainer_asked import ROWS, RUN, Told

from fedflame.errors import UserError
from fedflame.trainer.ask import answer_pieces, ask
from fedflame.trainer.server import MOST_CONNECTIONS, serve, sole_trainer
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site
from fedflame.trainer.unix_socket import listening
from fedflame.wire.envelope import Envelope, receive


@pytest.fixture
def door(make_service: Callable[..., TrainerService], tmp_path: Path, told: Told) -> Iterator[Path]:
    path = tmp_path / "door" / "trainer.sock"
    with listening(path) as listener:
        server = threading.Thread(target=serve, args=(listener, make_service(), told.append), daemon=True)
        server.start()
        yield path
    server.join(5)
    assert not server.is_alive() and not path.exists()


DESCRIBE = Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"})


def test_only_the_owner_has_rights_on_the_socket(door: Path) -> None:
    assert stat.S_IMODE(door.stat().st_mode) == 0o600
    assert ask(door, DESCRIBE, patience=1).header["num_examples"] == ROWS


def test_another_user_is_sent_away_even_through_an_open_door(
    door: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says whose the process at the other end is; this one is told that it is another user's."""
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(str(door))
        with pytest.raises(EOFError):
            receive(connection)
    assert told.will_hear("refused: a connection of another user")


def of_another_user(door: Path, try_it: Callable[[socket.socket], bool]) -> bool:
    """What comes of it where a process of another user tries it, whom every folder on the way lets pass."""
    for folder in door.parents:
        if folder.owner() == "root" and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o055)  # the group stays root's
    child = os.fork()
    if not child:
        went_so = False
        try:
            os.setuid(65534)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(5)
            went_so = try_it(connection)
        finally:
            os._exit(0 if went_so else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


only_root_can_try = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


@only_root_can_try
def test_another_user_cannot_open_the_socket(door: Path) -> None:
    def is_kept_out(connection: socket.socket) -> bool:
        with pytest.raises(PermissionError):
            connection.connect(str(door))
        return True

    assert of_another_user(door, is_kept_out)


@only_root_can_try
def test_another_user_whom_the_socket_lets_in_is_sent_away(door: Path, told: Told) -> None:
    def is_sent_away(connection: socket.socket) -> bool:
        connection.connect(str(door))
        return connection.recv(1) == b""

    door.chmod(0o777)
    assert of_another_user(door, is_sent_away)
    assert told.will_hear("refused: a connection of another user")


def test_nonsense_at_the_door_ends_that_connection_only(door: Path, told: Told) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(door))
        connection.sendall(b"x" * 100)
        with pytest.raises((EOFError, ConnectionResetError)):
            receive(connection)
    assert told.will_hear("refused: bytes that are no envelope")
    assert ask(door, DESCRIBE, patience=1).header["kind"] == "description"


def test_a_plan_that_is_longer_than_the_memory_allows_is_not_read(
    tmp_path: Path, make_service: Callable[..., TrainerService], told: Told
) -> None:
    service, path = make_service("[limits]\nmax_memory = 4e-6\n"), tmp_path / "door" / "trainer.sock"
    with listening(path) as listener:
        threading.Thread(target=serve, args=(listener, service, told.append), daemon=True).start()
        assert ask(path, Envelope(DESCRIBE.header, bytes(1000)), patience=1).header["kind"] == "description"
        with pytest.raises(OSError, match="no trainer at"):
            ask(path, Envelope(DESCRIBE.header, bytes(1001)), patience=0)
    assert told.will_hear("refused: envelope with a body of 1,001 bytes; at most 1,000 are read") == 1


def test_of_many_connections_some_are_closed_until_others_end(door: Path, told: Told) -> None:
    with ExitStack() as held:
        for _ in range(MOST_CONNECTIONS):
            held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).connect(str(door))
        with pytest.raises(OSError, match="no trainer at"):
            ask(door, DESCRIBE, patience=0)
        assert told.will_hear(f"refused: a connection beside {MOST_CONNECTIONS} others") == 1
    assert ask(door, DESCRIBE, patience=5).header["kind"] == "description"


def test_a_trainer_that_stays_away_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    with pytest.raises(OSError, match=r"no trainer at .*nobody\.sock: "):
        ask(path, DESCRIBE, patience=0)
    answer = Envelope.from_bytes(b"".join(answer_pieces(path, DESCRIBE.pieces(), patience=0)))
    assert answer.header["kind"] == "failed" and answer.header["ticket"] == "t"
    assert "no trainer at" in answer.header["reason"]


def test_a_second_trainer_of_a_site_is_refused(data: Path, tmp_path: Path) -> None:
    site = load_site(write_site(tmp_path, "north", data, 2, {"m": "m"}))
    refusal = pytest.raises(UserError, match=rf"serves north already \(process {os.getpid()} on .* since 2")
    with sole_trainer(site), refusal, sole_trainer(site):
        pass
    with sole_trainer(site):
        assert stat.S_IMODE(site.state_path.stat().st_mode) == 0o700


def test_a_state_folder_that_cannot_be_is_refused(data: Path, tmp_path: Path) -> None:
    site = load_site(write_site(tmp_path, "north", data, 2, {"m": "m"}))
    site.state_path.touch()
    with (
        pytest.raises(UserError, match=r"/state: cannot be made: File exists$"),
        sole_trainer(site),
    ):
        pass


def test_whoever_hangs_up_ends_that_connection_only(door: Path, told: Told) -> None:
    for said in (b"", b"flame", DESCRIBE.to_bytes()):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(door))
            connection.sendall(said)
    assert ask(door, DESCRIBE, patience=1).header["kind"] == "description"
    while any("_converse" in thread.name for thread in threading.enumerate()):
        time.sleep(0.01)  # what one of them raised would fail this test
    assert not told


def test_one_connection_may_ask_again_and_again(door: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(door))
        for _ in range(3):
            connection.sendall(DESCRIBE.to_bytes())
            assert receive(connection).header["num_examples"] == ROWS


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="longer than the 107 letters"), listening(tmp_path / ("x" * 110)):
        pass
