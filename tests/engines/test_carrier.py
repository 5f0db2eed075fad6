"""Flower's ServerApp and ClientApp without its processes: over a grid that is here, and may misbehave."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from tests.engines.driver_here import LEARNED, RUN, SITES, answer, updates

from fedflame.engines.clients import EngineClients
from fedflame.engines.flower import carrier
from fedflame.engines.flower.client_app import app as client_app
from fedflame.engines.flower.grid_engine import GridEngine
from fedflame.engines.flower.nodes import AskedNodes, RegisteredNodes
from fedflame.engines.flower.payload import from_content, from_name, to_content, to_name
from fedflame.engines.hub import FlowerHub, Hub, HubRounds
from fedflame.engines.jobs import engine_jobs
from fedflame.errors import UserError
from fedflame.trainer.ask import SOCKET_VARIABLE
from fedflame.trainer.unix_socket import listening
from fedflame.wire.envelope import Envelope, receive, send_pieces

NODES = {"north": 101, "south": 102, "west": 103}
SUPERLINK = 1
NODE_UNAVAILABLE = 5
Reply = Callable[[int, Message], Message | None]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def server_app(impatient: None, whole: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the identity that Flower gives a ServerApp's process, without which it makes no message."""
    monkeypatch.setattr(carrier, "POLL_SECONDS", 0.01)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK


def honest(node: int, message: Message) -> Message:
    return Message(to_content([answer(from_content(message.content))]), reply_to=message)


@dataclass
class FakeGrid:
    """Of nodes that answer at once, at the next pull; those without an answer stay silent."""

    reply: Reply = honest
    online: set[int] = field(default_factory=lambda: set(NODES.values()))
    pushed: list[Message] = field(default_factory=list)
    replies: dict[str, Message] = field(default_factory=dict)

    def get_node_ids(self) -> Iterable[int]:
        return set(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            number = f"message-{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = number
            self.pushed.append(message)
            node = message.metadata.dst_node_id
            reply = self.reply(node, message)
            if reply is not None:
                self.replies[number] = reply
            yield number

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [number for number in sorted(message_ids, reverse=True) if number in self.replies]
        return [self.replies.pop(number) for number in found]


def unavailable(message: Message) -> Message:
    """As the SuperLink says it, in its own name."""
    reply = Message(Error(NODE_UNAVAILABLE, "Node is unavailable\nmore words"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = SUPERLINK
    return reply


@dataclass
class Driver:
    clients: EngineClients
    engine: GridEngine
    said: list[str]

    def round(self) -> list[Any]:
        plans = [(client, f"plan {client}".encode()) for client in range(len(SITES))]
        return list(self.clients.train(plans, lambda tokens: None))


def a_hub(nodes: dict[str, int], **rounds: float) -> Hub:
    limits = HubRounds(**{"rejoin_timeout": 0.1, **rounds})
    return Hub(sites=tuple(SITES), rounds=limits, flower=FlowerHub(nodes=nodes))


@contextmanager
def driver(grid: FakeGrid, folder: Path, hub: Hub | None = None) -> Iterator[Driver]:
    hub = hub or a_hub(NODES)
    fake: Any = grid
    engine, said = GridEngine(fake, hub), list[str]()
    with engine_jobs(engine, said.append) as jobs:
        clients = EngineClients(engine, jobs, RUN, {}, SITES, hub.rounds, 1, folder, said.append)
        yield Driver(clients, engine, said)


def test_each_site_gets_one_message_with_one_array_and_its_answer_is_its_own(tmp_path: Path) -> None:
    grid = FakeGrid()
    with driver(grid, tmp_path) as hub:
        assert updates(hub.round()) == LEARNED
        assert updates(hub.round()) == LEARNED
    assert [message.metadata.dst_node_id for message in grid.pushed] == [*NODES.values()] * 2
    for message in grid.pushed:
        (record,) = message.content.array_records.values()
        assert [array.dtype for array in record.values()] == ["uint8"] and len(message.content) == 1
        assert message.metadata.ttl > hub.clients.rounds.round_timeout


def test_an_error_belongs_to_the_message_it_replies_to_whoever_sends_it(tmp_path: Path) -> None:
    def lose_south(node: int, message: Message) -> Message:
        return unavailable(message) if node == NODES["south"] else honest(node, message)

    hub_file = a_hub(NODES, max_resubmissions=1)
    with driver(FakeGrid(lose_south), tmp_path, hub_file) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], b"", LEARNED[2]]
        assert answers[1].failure == "its engine says Node is unavailable (error 5)"


def test_a_site_whose_node_is_back_still_takes_part_in_the_round(tmp_path: Path) -> None:
    grid = FakeGrid()

    def lose_south_once(node: int, message: Message) -> Message:
        if node == NODES["south"] and len(grid.pushed) < 4:
            return unavailable(message)
        return honest(node, message)

    grid.reply = lose_south_once
    with driver(grid, tmp_path, a_hub(NODES, rejoin_timeout=20.0)) as hub:
        assert updates(hub.round()) == LEARNED


@pytest.mark.slow
def test_a_slow_site_holds_nobody_up_and_its_late_reply_is_refused(tmp_path: Path) -> None:
    late: list[Message] = []

    def slow_south(node: int, message: Message) -> Message | None:
        if node == NODES["south"] and not late:
            late.append(message)
            return None
        return honest(node, message)

    grid = FakeGrid(slow_south)
    with driver(grid, tmp_path, a_hub(NODES, round_timeout=3)) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], b"", LEARNED[2]]
        assert max(answers[0].seconds, answers[2].seconds) < 2
        grid.replies[late[0].metadata.message_id] = honest(NODES["south"], late[0])
        deadline = time.monotonic() + 10
        while grid.replies and time.monotonic() < deadline:
            time.sleep(0.01)
        assert updates(hub.round()) == LEARNED
        assert "refused: a late or repeated answer of south" in hub.said


def test_a_site_without_its_node_is_named_and_nobody_else_is_asked_for_it(tmp_path: Path) -> None:
    """A node of another key counts for nothing, whatever it calls itself."""
    grid = FakeGrid(online={NODES["south"], NODES["west"], 999})
    with driver(grid, tmp_path) as hub:
        answers = hub.round()
        assert updates(answers) == [b"", LEARNED[1], LEARNED[2]]
        assert answers[0].failure == "not connected"
        assert hub.engine.connected() == {"south", "west"}
    assert {message.metadata.dst_node_id for message in grid.pushed} == {NODES["south"], NODES["west"]}


NOT_OURS = Array(dtype="uint8", shape=(7,), stype="numpy.ndarray", data=b"garbage")


@pytest.mark.parametrize("array", [None, NOT_OURS])
def test_an_answer_that_is_no_array_of_ours_is_refused(array: Array | None, tmp_path: Path) -> None:
    """It is not even parsed."""
    records = {} if array is None else {"fedflame": ArrayRecord({"envelope": array})}

    def silly(node: int, message: Message) -> Message:
        return (
            honest(node, message) if node != NODES["west"] else Message(RecordDict(records), reply_to=message)
        )

    with driver(FakeGrid(silly), tmp_path) as hub:
        answers = hub.round()
        assert updates(answers) == [LEARNED[0], LEARNED[1], b""]
        assert answers[2].failure == "its answer is refused: 0 bytes that are no envelope"


def test_a_superlink_that_is_lost_ends_the_job_and_the_next_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    grid, lost = FakeGrid(), threading.Event()

    def lose_once(message_ids: Iterable[str]) -> Iterable[Message]:
        if not lost.is_set():
            lost.set()
            raise ConnectionError("no route")
        return FakeGrid.pull_messages(grid, message_ids)

    monkeypatch.setattr(grid, "pull_messages", lose_once)
    with driver(grid, tmp_path) as hub:
        assert updates(hub.round()) == LEARNED
        assert any("is over" in line for line in hub.said)


# Nodes without keys


def say(names: dict[int, str]) -> Reply:
    def reply(node: int, message: Message) -> Message | None:
        if message.metadata.message_type == MessageType.QUERY:
            return Message(to_name(names[node]), reply_to=message)
        return honest(node, message)

    return reply


def test_nodes_without_keys_are_asked_once_before_a_request_is_turned_away(tmp_path: Path) -> None:
    names = dict(zip(NODES.values(), SITES, strict=True))
    grid = FakeGrid(say(names))
    with driver(grid, tmp_path, a_hub({})) as hub:
        assert updates(hub.round()) == LEARNED
        assert updates(hub.round()) == LEARNED
    kinds = [message.metadata.message_type for message in grid.pushed]
    assert kinds.count(MessageType.QUERY) == 3 and kinds.count(MessageType.TRAIN) == 6


def test_of_two_nodes_with_one_name_the_later_counts_and_a_strangers_name_not_at_all() -> None:
    grid = FakeGrid(say({101: "north", 102: "elsewhere", 201: "north"}), online={101, 102})
    nodes, ours = AskedNodes(SITES), grid_of(grid)
    assert nodes.reached(ours) == {"north": 101} and not nodes.asking
    grid.online.add(201)
    assert nodes.reached(ours) == {"north": 201}
    grid.online.remove(201)
    assert nodes.reached(ours) == {"north": 101}


def grid_of(fake: Any) -> Grid:
    grid: Grid = fake
    return grid


def test_registered_nodes_are_never_asked() -> None:
    grid = FakeGrid()
    assert RegisteredNodes({"north": 101, "south": 7}).reached(grid_of(grid)) == {"north": 101}
    assert not grid.pushed


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ({"north": 1}, "flower.nodes.south is missing"),
        (
            {"north": 1, "south": 2, "west": 3, "east": 4},
            r"flower.nodes.east: no such site",
        ),
        ({"north": 1, "south": 2, "west": 1}, "two sites have the same node"),
    ],
)
def test_nodes_that_are_not_those_of_the_sites_are_refused(nodes: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        GridEngine(grid_of(FakeGrid()), a_hub(nodes))


# The ClientApp


def asked(message: Message, **node_config: str) -> Message:
    context = Context(run_id=1, node_id=101, node_config={**node_config}, state=RecordDict(), run_config={})
    return client_app(message, context)


@pytest.mark.parametrize("by", ["environment", "node config"])
def test_the_client_app_carries_bytes_to_the_trainer_that_the_site_names(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trainer.sock"
    monkeypatch.setenv(SOCKET_VARIABLE, str(path if by == "environment" else tmp_path / "none.sock"))
    config = {} if by == "environment" else {"trainer": str(path)}
    request = Envelope({"kind": "train", "ticket": "t", "run": RUN, "site": "north"}, b"plan").to_bytes()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            send_pieces(connection, [answer(receive(connection).to_bytes())])

    with listening(path) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        reply = asked(Message(to_content([request]), 101, MessageType.TRAIN), **config)
    assert from_content(reply.content) == answer(request)


def test_the_client_app_of_a_site_that_names_no_trainer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOCKET_VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match=f"neither {SOCKET_VARIABLE} nor the node config's trainer"):
        asked(Message(to_content([]), 101, MessageType.TRAIN))


def test_the_client_app_says_the_name_of_its_node_config() -> None:
    assert from_name(asked(Message(RecordDict(), 101, MessageType.QUERY), site="north").content) == "north"
    assert from_name(asked(Message(RecordDict(), 101, MessageType.QUERY)).content) == ""
