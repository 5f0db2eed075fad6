"""The clients of a run at their sites, behind an engine: plans out, answers back, whatever ends in between.

A request has a ticket that is drawn anew each time, so that an answer can be told from a late, repeated or
foreign one. If a job ends, the next is asked for all that is still open; sites that have trained already
answer again without training twice.
"""

from __future__ import annotations

import mmap
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedflame.clients.answers import Answer, OnStep
from fedflame.engines.engine import Engine
from fedflame.engines.hub import HubRounds
from fedflame.engines.jobs import POLL_SECONDS, EngineJobEnded, EngineJobs
from fedflame.errors import InvalidMessage, UserError
from fedflame.wire.addition import encode_addition, plan_digest
from fedflame.wire.envelope import Bytes, Envelope

BACKOFF_SECONDS = 2.0
ANSWER_MEMORY = 512_000_000
"""Bytes of answers that may wait in memory until their turn; what comes beyond waits on disk."""
REJOIN_POLL_SECONDS = 5.0


def _new_ticket() -> str:
    return secrets.token_hex(16)


@dataclass
class _Request:
    """What one site is asked for; it lies on disk, where memory does not grow with the sites."""

    site: str
    kind: str
    plan_path: Path
    """The whole plan that it asks for, unless it asks for a description."""
    ticket: str = field(default_factory=_new_ticket)
    addition: bool = False
    """Whether it asks with what the plan adds to the one that the site holds."""
    start: float = field(default_factory=time.monotonic)
    gone: str = ""
    """Why the engine does not reach the site, as long as it does not."""
    returns: int = 0
    """Jobs that were started since the site was back."""
    failure: str = ""
    header: Mapping[str, Any] | None = None
    """Of the answer."""
    body: Bytes | None = None
    """Of the answer, unless it is in `answer_path`."""
    seconds: float = 0.0
    sent: bool = False
    """To the job that runs."""
    bytes_down: int = 0
    """Sent so far; what a job that ended had of it, too."""

    @property
    def addition_path(self) -> Path:
        return self.plan_path.with_suffix(".addition")

    @property
    def held_path(self) -> Path:
        """The last plan that the site has answered."""
        return self.plan_path.with_suffix(".held")

    @property
    def answer_path(self) -> Path:
        return self.plan_path.with_suffix(".answer")

    @property
    def content(self) -> memoryview:
        """What it asks with."""
        if self.kind == "describe":
            return memoryview(b"")
        return _mapped(self.addition_path if self.addition else self.plan_path)

    @property
    def settled(self) -> bool:
        return self.header is not None or bool(self.failure)


@dataclass
class EngineClients:
    """All clients of a run, one per site, in the order of `sites`."""

    engine: Engine
    engine_jobs: EngineJobs
    run: str
    """32 hexadecimal digits, the same after a resumption."""
    job: Mapping[str, Any]
    """`TrainingJob` as JSON."""
    sites: Sequence[str]
    rounds: HubRounds
    quorum: int
    """Updates after which `straggler_grace` begins."""
    folder: Path
    """For what is on its way; it is emptied as answers are taken."""
    say: Callable[[str], None]
    _failures: int = 0
    _absent: set[str] = field(default_factory=set)
    """Sites that did not come back in time; nobody waits for them until they do."""
    _known: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def num_examples(self) -> list[int]:
        return [self._known[site]["num_examples"] if site in self._known else 0 for site in self.sites]

    def name(self, client: int) -> str:
        return self.sites[client]

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        requests = [self._request_update(self.sites[client], plan) for client, plan in plans]
        self._exchange(requests, self.quorum)
        for request in requests:
            yield _answer(request, on_step)

    def describe(self) -> dict[str, Mapping[str, Any]]:
        """What the sites that answer say of themselves: `num_examples` and `active_experts`."""
        requests = [_Request(site, "describe", self._plan_path(site)) for site in self.sites]
        self._exchange(requests, len(requests))
        for request in requests:
            request.answer_path.unlink(missing_ok=True)
        for request in requests:
            if request.failure:
                self.say(f"{request.site}: {request.failure}")
        self._known = {request.site: request.header for request in requests if request.header is not None}
        return self._known

    def _plan_path(self, site: str) -> Path:
        return self.folder / f"{site}.plan"

    def _request_update(self, site: str, plan: bytes) -> _Request:
        """With what the site lacks of the plan, as far as is known here."""
        request = _Request(site, "train", self._plan_path(site))
        request.plan_path.write_bytes(plan)
        held = request.held_path if request.held_path.exists() else None
        # Of a run that goes on: the site has trained this round before the driver ended.
        if self._known.get(site, {}).get("held") == plan_digest(plan):
            held = request.plan_path
        addition = encode_addition(_mapped(request.plan_path), _mapped(held)) if held else None
        if addition is not None:
            request.addition = True
            request.addition_path.write_bytes(addition)
        return request

    def _exchange(self, requests: Sequence[_Request], quorum: int) -> None:
        """Settle every request: by an answer, or by the reason why there is none.

        Raises:
            UserError: job after job ended without an answer between them.
        """
        self._readmit(requests)
        begun, reached = time.monotonic(), None
        while open_requests := [request for request in requests if not request.settled]:
            now = time.monotonic()
            if reached is None and sum(request.header is not None for request in requests) >= quorum:
                reached = now
            if reason := self._over(begun, reached, now):
                _fail(open_requests, reason)
                break
            try:
                if self.engine_jobs.current is None:
                    self._start_job(open_requests)
                for request in open_requests:
                    self._send(request)
                event = self.engine_jobs.event(POLL_SECONDS)
                if event is not None:
                    self._take(event, requests)
                else:
                    self._rejoin(open_requests)
            except EngineJobEnded as error:
                self._count(str(error))
        for request in requests:
            request.addition_path.unlink(missing_ok=True)
            if request.header is not None and request.plan_path.exists():
                request.plan_path.replace(request.held_path)
            request.plan_path.unlink(missing_ok=True)

    def _send(self, request: _Request) -> None:
        if request.sent:
            return
        header = {
            "kind": request.kind,
            "ticket": request.ticket,
            "run": self.run,
            "site": request.site,
            "job": self.job,
            "addition": request.addition,
        }
        content = Envelope(header, request.content).pieces()
        self.engine_jobs.carry(request.ticket, request.site, *content)
        request.sent = True
        request.bytes_down += sum(map(len, content))

    def _over(self, begun: float, reached: float | None, now: float) -> str:
        """Why nobody is waited for any longer, or empty."""
        if now - begun > self.rounds.round_timeout:
            return f"no answer within {self.rounds.round_timeout:.0f} s (rounds.round_timeout)"
        grace = self.rounds.straggler_grace
        if reached is not None and grace and now - reached > grace:
            return f"no answer within {grace:.0f} s of the others (rounds.straggler_grace)"
        return ""

    def _start_job(self, open_requests: Iterable[_Request]) -> None:
        if self._failures > self.rounds.max_resubmissions:
            raise UserError(
                f"{self._failures} jobs ended one after another without an answer (see above); what is "
                "finished is kept, and --resume goes on"
            )
        self.engine_jobs.start(self.rounds.start_timeout)
        for request in open_requests:
            request.gone, request.sent = "", False

    def _count(self, reason: str) -> None:
        self._failures += 1
        self.say(reason)
        time.sleep(BACKOFF_SECONDS * min(self._failures, 5))

    def _take(self, event: Envelope, requests: Sequence[_Request]) -> None:
        """Settle the request that this word of the job is about."""
        kind = event.header.get("kind")
        if kind == "sites" and self.engine_jobs.current is not None:
            self.engine_jobs.current.sites = set(event.header["sites"])
            return
        found = [request for request in requests if request.ticket == event.header.get("ticket")]
        if not found or found[0].settled:
            self.say(f"refused: a late or repeated answer of {event.header.get('site')}")
            return
        request = found[0]
        if kind == "failed":
            request.gone = str(event.header.get("reason"))
            self.say(f"{request.site}: {request.gone}")
            return
        try:
            answer = Envelope.from_bytes(event.body)
            _require_answer(answer, event, request, self.run)
        except InvalidMessage as error:
            self.say(f"refused: an answer of {event.header.get('site')}: {error}")
            request.failure = f"its answer is refused: {error}"
            return
        self._failures = 0
        self._absent.discard(request.site)
        request.seconds = time.monotonic() - request.start
        if answer.header["kind"] in ("refused", "failed"):
            prefix = "the site refuses: " if answer.header["kind"] == "refused" else ""
            request.failure = f"{prefix}{answer.header.get('reason')}"
            return
        if answer.header["kind"] == "lacking":
            self.say(f"{request.site}: {answer.header.get('reason')}; it is sent the whole plan")
            request.ticket, request.addition, request.sent = _new_ticket(), False, False
            return
        waiting = sum(len(other.body) for other in requests if other.body is not None)
        if waiting + len(answer.body) <= ANSWER_MEMORY:
            request.body = answer.body
        else:
            request.answer_path.write_bytes(answer.body)
        request.header = answer.header

    def _rejoin(self, open_requests: Sequence[_Request]) -> None:
        """Once only sites are open that are gone: a new job where one is back, or no longer wait for it."""
        gone = [request for request in open_requests if request.gone]
        if len(gone) < len(open_requests):
            return
        back = self.engine.connected()
        returned = [request for request in gone if back is not None and request.site in back]
        # A site that is there and answers nothing is wrongly set up; no further job mends that.
        returned = [request for request in returned if request.returns < self.rounds.max_resubmissions]
        if returned:
            for request in returned:
                request.returns += 1
            self.engine_jobs.stop()
            return
        for request in gone:
            if request.site in self._absent or time.monotonic() - request.start > self.rounds.rejoin_timeout:
                request.failure = request.gone
                self._absent.add(request.site)
        time.sleep(min(REJOIN_POLL_SECONDS, self.rounds.rejoin_timeout))

    def _readmit(self, requests: Sequence[_Request]) -> None:
        """A new job where the one that runs lacks a site that is back."""
        job = self.engine_jobs.current
        lacking = {request.site for request in requests} - (job.sites if job else set())
        if job is None or not job.sites or not lacking:
            return
        if lacking & (self.engine.connected() or set()):
            self.engine_jobs.stop()


def _mapped(path: Path) -> memoryview:
    """The bytes of a file that is not empty, read only as they are needed. Changes would stay in memory."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _require_answer(answer: Envelope, event: Envelope, request: _Request, run: str) -> None:
    """What the site says must be about what it was asked for, and the engine must know it as that site."""
    if event.header.get("site") != request.site or answer.header.get("site") != request.site:
        raise InvalidMessage(f"it is for {request.site}")
    for name, wanted in (("ticket", request.ticket), ("run", run)):
        if answer.header.get(name) != wanted:
            raise InvalidMessage(f"its {name} is not the one that was asked for")
    wanted = "description" if request.kind == "describe" else "update"
    kind = answer.header.get("kind")
    if kind not in (wanted, "refused", "failed", *(["lacking"] if request.addition else [])):
        raise InvalidMessage(f"it is of kind {kind!r}")
    rows = answer.header.get("num_examples")
    if kind == "description" and (type(rows) is not int or not 1 <= rows < 2**63):
        raise InvalidMessage(f"it has {rows!r} rows; a number from 1 is needed")


def _answer(request: _Request, on_step: OnStep) -> Answer:
    """Taken from memory or disk, where it is no longer needed then."""
    if request.header is None:
        return Answer(b"", request.failure, request.seconds, request.bytes_down)
    update, request.body = request.body, None
    if update is None:
        update = request.answer_path.read_bytes()
        request.answer_path.unlink()
    steps, tokens = request.header.get("steps"), request.header.get("tokens")
    if isinstance(steps, int) and isinstance(tokens, int):
        for _ in range(min(steps, 1_000_000)):
            on_step(tokens // steps)
    return Answer(update, "", request.seconds, request.bytes_down)


def _fail(requests: Iterable[_Request], reason: str) -> None:
    for request in requests:
        request.failure = request.gone or reason
        request.seconds = time.monotonic() - request.start
