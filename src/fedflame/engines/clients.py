"""The clients of a run at their sites, reached through an engine: sends plans and collects the answers.

Every request has a new random ticket. It tells the right answer from a late, repeated or foreign one. If a
job ends, the next job gets all requests that are still open. Sites that have already trained send their
answer again and do not train twice.
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
"""Bytes of answers that may wait in memory for their turn; further answers wait on disk."""
REJOIN_POLL_SECONDS = 5.0


def _new_ticket() -> str:
    return secrets.token_hex(16)


@dataclass
class _Request:
    """A request to one site. Its plan is on disk, so that memory does not grow with the number of sites."""

    site: str
    kind: str
    plan_path: Path
    """File of the whole plan; unused if the request asks for a description."""
    ticket: str = field(default_factory=_new_ticket)
    addition: bool = False
    """Whether to send only the difference between the plan and the plan that the site holds."""
    start: float = field(default_factory=time.monotonic)
    gone: str = ""
    """Why the engine does not reach the site; empty while it does."""
    returns: int = 0
    """Jobs that were started because the site was back."""
    failure: str = ""
    header: Mapping[str, Any] | None = None
    """The header of the answer, once there is one."""
    body: Bytes | None = None
    """The body of the answer, unless it is in `answer_path`."""
    seconds: float = 0.0
    sent: bool = False
    """Whether it was sent to the current job."""
    bytes_down: int = 0
    """Bytes sent so far, including those to jobs that ended."""

    @property
    def addition_path(self) -> Path:
        return self.plan_path.with_suffix(".addition")

    @property
    def held_path(self) -> Path:
        """File of the last plan that the site has answered."""
        return self.plan_path.with_suffix(".held")

    @property
    def answer_path(self) -> Path:
        return self.plan_path.with_suffix(".answer")

    @property
    def content(self) -> memoryview:
        """The body of the request."""
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
    """The `TrainingJob` as JSON."""
    sites: Sequence[str]
    rounds: HubRounds
    quorum: int
    """Number of updates after which `straggler_grace` begins."""
    folder: Path
    """Folder for plans and answers in transit; answers are deleted once they are used."""
    say: Callable[[str], None]
    _failures: int = 0
    _absent: set[str] = field(default_factory=set)
    """Sites that did not come back in time; the run does not wait for them until they are back."""
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
        """Ask all sites for `num_examples` and `active_experts`; return the answers by site."""
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
        """Prepare a request with the plan, or with its difference to the plan that the site holds."""
        request = _Request(site, "train", self._plan_path(site))
        request.plan_path.write_bytes(plan)
        held = request.held_path if request.held_path.exists() else None
        # In a resumed run, the site may have trained this round before the driver ended.
        if self._known.get(site, {}).get("held") == plan_digest(plan):
            held = request.plan_path
        addition = encode_addition(_mapped(request.plan_path), _mapped(held)) if held else None
        if addition is not None:
            request.addition = True
            request.addition_path.write_bytes(addition)
        return request

    def _exchange(self, requests: Sequence[_Request], quorum: int) -> None:
        """Wait until every request has an answer, or a reason why there is none.

        Raises:
            UserError: more than `max_resubmissions` jobs in a row ended without an answer.
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
        """Return why the round stops waiting for the open requests; empty if it does not."""
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
        """Handle one message of the job, and settle the request that it answers."""
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
        """If all open sites are gone, start a new job if some are back, and give up those gone too long."""
        gone = [request for request in open_requests if request.gone]
        if len(gone) < len(open_requests):
            return
        back = self.engine.connected()
        returned = [request for request in gone if back is not None and request.site in back]
        # A site that is connected but never answers is set up wrongly. More jobs do not help.
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
        """End the current job if it lacks a site that is back, so that the next job reaches it."""
        job = self.engine_jobs.current
        lacking = {request.site for request in requests} - (job.sites if job else set())
        if job is None or not job.sites or not lacking:
            return
        if lacking & (self.engine.connected() or set()):
            self.engine_jobs.stop()


def _mapped(path: Path) -> memoryview:
    """Map a file that is not empty into memory. Writes to the view do not change the file."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _require_answer(answer: Envelope, event: Envelope, request: _Request, run: str) -> None:
    """Raise InvalidMessage unless the answer is to this request and comes from the site that was asked."""
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
    """Take the answer from memory or from disk, and delete it there."""
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
