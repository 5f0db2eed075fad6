"""The driver's end of an engine's jobs: from submission to end, and who comes to its socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedflame.engines.jobs import EngineJobEnded, EngineJobs, engine_jobs
from fedflame.engines.link import HubLink
from fedflame.wire.envelope import Envelope, send

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient")]


@dataclass
class Bare:
    """An engine that connects its job and does nothing more; a test says what the job says."""

    hello: Callable[[Path, str], HubLink | None] = HubLink
    links: list[HubLink] = field(default_factory=list)
    over: dict[str, str] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def submit(self, hub_socket: Path, job_key: str) -> str:
        self.submitted.append(f"job-{len(self.submitted) + 1}")
        link = self.hello(hub_socket, job_key)
        if link is not None:
            self.links.append(link)
        return self.submitted[-1]

    def ended(self, job: str) -> str | None:
        return self.over.get(job)

    def stop(self, job: str) -> None:
        self.stopped.append(job)

    def connected(self) -> set[str] | None:
        return None


@contextmanager
def jobs_of(engine: Bare) -> Iterator[tuple[EngineJobs, list[str]]]:
    said: list[str] = []
    with engine_jobs(engine, said.append) as jobs:
        yield jobs, said
    for link in engine.links:
        link.close()


def word(jobs: EngineJobs) -> Envelope:
    """The job's next one."""
    while (event := jobs.event(0.05)) is None:
        pass
    return event


def is_at_its_end(link: HubLink) -> bool:
    """Whether the driver has closed it; the test's time is over where it has not."""
    return link.next_request() is None


# A job from its submission to its end


def test_a_job_that_is_there_is_said_and_may_be_silent_for_any_time() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, said):
        job = jobs.start(5)
        assert job is jobs.current and (job.id, said) == ("job-1", ["job job-1 is there"])
        assert job.connection.gettimeout() is None
        assert jobs.event(0) is None
        engine.links[0].sites(["b", "a"])
        assert word(jobs).header == {"kind": "sites", "sites": ["a", "b"]}


def test_a_job_that_is_stopped_loses_its_connection_and_the_engine_hears_of_it() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        jobs.stop()
        assert jobs.current is None and is_at_its_end(engine.links[0])
        jobs.stop()
        assert engine.stopped == ["job-1"], "of a job that is not there nothing can end"


def test_with_the_driver_goes_its_job() -> None:
    engine, before = Bare(), threading.active_count()
    with pytest.raises(KeyboardInterrupt), jobs_of(engine) as (jobs, _):
        jobs.start(5)
        raise KeyboardInterrupt
    assert engine.stopped == ["job-1"] and is_at_its_end(engine.links[0])
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before, "no thread is left"


def test_a_job_that_says_no_word_is_stopped() -> None:
    engine = Bare(hello=lambda path, key: None)
    with jobs_of(engine) as (jobs, said):
        with pytest.raises(EngineJobEnded, match="job job-1 did not say a word in time"):
            jobs.start(0.1)
        assert engine.stopped == ["job-1"] and jobs.current is None and said == []


def test_the_late_word_of_a_job_before_is_not_taken_for_the_next_ones() -> None:
    keys: list[str] = []
    engine = Bare(hello=lambda path, key: keys.append(key))
    with jobs_of(engine) as (jobs, _):
        with pytest.raises(EngineJobEnded):
            jobs.start(0.1)
        late = HubLink(jobs._path, keys[0])
        while not jobs._hellos.qsize():
            time.sleep(0.01)
        engine.hello = HubLink
        jobs.start(5)
        engine.links[0].sites(["a"])
        assert word(jobs).header["sites"] == ["a"]
        assert is_at_its_end(late)


def test_a_job_whose_end_the_engine_knows_is_over_though_its_connection_stands() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        engine.over["job-1"] = "FINISHED:ABORTED"
        with pytest.raises(EngineJobEnded, match="job job-1 is over: FINISHED:ABORTED"):
            word(jobs)
        assert jobs.current is None and is_at_its_end(engine.links[0]) and engine.stopped == ["job-1"]


def test_why_a_job_ended_is_the_engines_word_where_it_has_one() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        engine.over["job-1"] = "FINISHED:ABORTED"
        engine.links[0].close()
        with pytest.raises(EngineJobEnded, match="job job-1 is over: FINISHED:ABORTED"):
            jobs.carry("ticket", "north", 100, b"request")


def test_a_job_whose_connection_ends_is_over_though_the_engine_knows_of_no_end() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        engine.links[0].close()
        with pytest.raises(EngineJobEnded, match="job job-1 is over: its connection ended"):
            word(jobs)
        assert jobs.current is None and engine.stopped == ["job-1"]


def test_a_job_that_says_what_is_no_envelope_is_over() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        engine.links[0]._connection.sendall(b"nonsense" * 10)
        with pytest.raises(EngineJobEnded, match="its connection ended"):
            word(jobs)
        assert is_at_its_end(engine.links[0])


def test_to_a_job_that_has_gone_nothing_can_be_carried() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        engine.links[0].close()
        with pytest.raises(EngineJobEnded, match="job job-1 is over: its connection ended"):
            jobs.carry("ticket", "north", 100, b"request")
        assert jobs.current is None and engine.stopped == ["job-1"]


def test_what_an_earlier_job_has_said_and_its_end_are_not_the_next_ones() -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        engine.links[0].failed("ticket", "north", "disconnected")
        engine.links[0].close()
        while jobs._events.qsize() < 2:
            time.sleep(0.01)
        jobs.stop()
        jobs.start(5)
        assert jobs.event(0.05) is None and jobs.event(0.05) is None
        engine.links[1].sites(["a"])
        assert word(jobs).header["sites"] == ["a"]


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"ticket": "t"}, 101),
        ({"ticket": "another"}, 1),
        ({"ticket": ["t"]}, 1),
        ({}, 1),
    ],
)
def test_a_message_that_brings_more_than_any_answer_is_not_read_and_ends_the_job(
    header: dict[str, Any], size: int
) -> None:
    engine = Bare()
    with jobs_of(engine) as (jobs, _):
        jobs.start(5)
        jobs.carry("t", "north", 100, b"request")
        send(engine.links[0]._connection, {"ticket": "t"}, bytes(100))
        assert word(jobs).body == bytes(100)
        send(engine.links[0]._connection, header, bytes(size))
        with pytest.raises(EngineJobEnded, match="its connection ended"):
            word(jobs)


# Who comes to the socket


def stranger(jobs: EngineJobs) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5)
    connection.connect(str(jobs._path))
    return connection


def is_sent_away(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it was closed before all was read
        return True


@pytest.mark.parametrize(
    "hello",
    [
        Envelope({"kind": "hello"}).to_bytes(),
        Envelope({"kind": "hello", "job_key": 7}).to_bytes(),
        Envelope({"kind": "hello", "job_key": "another"}).to_bytes(),
        Envelope({"kind": "hello", "job_key": ""}, b"body").to_bytes(),
        b"nonsense" * 10,
    ],
)
def test_whoever_does_not_say_the_jobs_key_is_sent_away(hello: bytes) -> None:
    with jobs_of(Bare()) as (jobs, _):
        jobs.start(5)
        with stranger(jobs) as connection:
            connection.sendall(hello)
            assert is_sent_away(connection)


def test_whoever_hangs_up_or_is_silent_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.engines.jobs.HELLO_SECONDS", 0.1)
    with jobs_of(Bare()) as (jobs, _):
        with stranger(jobs) as connection:
            connection.sendall(b"flame")
        with stranger(jobs) as connection:
            assert is_sent_away(connection)
        jobs.start(5)
