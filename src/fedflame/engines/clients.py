"""The clients of a run at their sites, reached through an engine: sends plans and collects the answers.

Every request has a new random ticket. It tells the right answer from a late, repeated or foreign one. If a
job ends, the next job gets all requests that are still open. Sites that have already trained send their
answer again and do not train twice.

Whatever is wrong with a site's answer, that site is left out of the round with the reason. Nothing that a
site says ends a run.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedflame.clients.answers import Answer, OnStep
from fedflame.engines.answers import Description, progress, read_answer, said
from fedflame.engines.engine import Engine
from fedflame.engines.hub import HubRounds
from fedflame.engines.jobs import POLL_SECONDS, EngineJobEnded, EngineJobs
from fedflame.engines.patience import Patience, learned_wait
from fedflame.engines.requests import Request, mapped, new_ticket, store, sum_request
from fedflame.errors import InvalidMessage, UserError
from fedflame.messages import ClientUpdate
from fedflame.server.validation import believed, most_rows
from fedflame.wire.addition import encode_addition, plan_digest
from fedflame.wire.codec import EVALUATION_LIMIT, encoded_plan_work, encoded_update_limit
from fedflame.wire.envelope import LONGEST_BEFORE_BODY, Envelope

BACKOFF_SECONDS = 2.0
ANSWER_MEMORY = 512_000_000
"""Bytes of answers that may wait in memory for their turn; further answers wait on disk."""
REJOIN_POLL_SECONDS = 5.0


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
    left_out: dict[str, str] = field(default_factory=dict)
    """Sites that get no plan in this run -> why."""
    _failures: int = 0
    _absent: set[str] = field(default_factory=set)
    """Sites that did not come back in time; the run does not wait for them until they are back."""
    _known: dict[str, Description] = field(default_factory=dict)
    _patience: dict[str, Patience] = field(default_factory=lambda: defaultdict(Patience))
    """By kind of request: what it takes to score says nothing of what it takes to train."""
    _late: dict[str, Request] = field(default_factory=dict)
    """Ticket -> a request that was given up; its answer comes too late, but tells how long it took."""

    def num_examples(self) -> list[int]:
        return [self._known[site].num_examples if site in self._known else 0 for site in self.sites]

    def believed_rows(self, client: int) -> int:
        claims = self.num_examples()
        most = most_rows(claims)
        return min(claims[client] or most, most)

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        return believed(update, most_rows(self.num_examples()))

    def name(self, client: int) -> str:
        return self.sites[client]

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        requests = [self._request(self.sites[client], "train", plan) for client, plan in plans]
        return self._answers(requests, self.quorum, on_step)

    def evaluate(self, plans: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        requests = [self._request(self.sites[client], "evaluate", plan) for client, plan in plans]
        return self._answers(requests, self.quorum)

    def sums(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        plans = [(self._plan_path(self.sites[client]), message) for client, message in requests]
        asked = [sum_request(plan, message) for plan, message in plans]
        return self._answers(asked, len(asked))

    def test_rows(self) -> list[int | None]:
        told = {site: known.test_rows for site, known in self._known.items()}
        return [0 if site in self.left_out else told.get(site) for site in self.sites]

    def describe(self) -> dict[str, Description]:
        """Ask all sites what they have and afford; return the answers by site."""
        requests = [
            Request(site, "describe", self._plan_path(site), LONGEST_BEFORE_BODY) for site in self.sites
        ]
        self._exchange(requests, len(requests))
        for request in requests:
            if request.failure:
                self.say(f"{request.site}: {request.failure}")
        return self._known

    def _answers(
        self, requests: Sequence[Request], quorum: int, on_step: OnStep = lambda tokens: None
    ) -> Iterator[Answer]:
        self._exchange(requests, quorum)
        for request in requests:
            yield _answer(request, on_step)

    def leave_out(self, site: str, reason: str) -> None:
        """Send this site no plan in this run; the reason stands in every round that it misses."""
        self.left_out[site] = reason
        self.say(f"{site} is left out of all rounds: {reason}")

    def _plan_path(self, site: str) -> Path:
        return self.folder / f"{site}.plan"

    def _request(self, site: str, kind: Literal["train", "evaluate"], plan: bytes) -> Request:
        """Prepare a request with the plan, or with its difference to the plan that the site holds."""
        request = Request(site, kind, self._plan_path(site), 0, failure=self.left_out.get(site, ""))
        if request.failure:
            return request
        store(request.plan_path, plan)
        request.longest_answer = LONGEST_BEFORE_BODY + (
            encoded_update_limit(mapped(request.plan_path)) if kind == "train" else EVALUATION_LIMIT
        )
        request.work = encoded_plan_work(mapped(request.plan_path))
        held = request.held_path if request.held_path.exists() else None
        # In a resumed run, the site may have answered this plan before the driver ended.
        if site in self._known and self._known[site].held == plan_digest(plan):
            held, request.answered_before = request.plan_path, True
        addition = encode_addition(mapped(request.plan_path), mapped(held)) if held else None
        if addition is not None:
            request.addition = True
            store(request.addition_path, addition)
        return request

    def _exchange(self, requests: Sequence[Request], quorum: int) -> None:
        """Wait until every request has an answer, or a reason why there is none.

        Raises:
            UserError: more than `max_resubmissions` jobs in a row ended without an answer.
        """
        self._readmit([request for request in requests if not request.settled])
        begun, reached = time.monotonic(), None
        while open_requests := [request for request in requests if not request.settled]:
            now = time.monotonic()
            if reached is None and sum(request.answered for request in requests) >= quorum:
                reached = now
            for request in open_requests:
                if reason := self._over(request, begun, reached, now):
                    self._give_up(request, request.gone or reason)
            open_requests = [request for request in open_requests if not request.settled]
            if not open_requests:
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
            if request.answered and request.has_plan:
                request.plan_path.replace(request.held_path)
            request.plan_path.unlink(missing_ok=True)

    def _send(self, request: Request) -> None:
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
        self.engine_jobs.carry(request.ticket, request.site, request.longest_answer, *content)
        request.sent, request.asked = True, time.monotonic()
        request.bytes_down += sum(map(len, content))

    def _over(self, request: Request, begun: float, reached: float | None, now: float) -> str:
        """Return why an open request is not waited for any longer; empty if it is."""
        grace = self.rounds.straggler_grace
        if now - begun > self.rounds.round_timeout:
            return f"no answer within {self.rounds.round_timeout:.0f} s (rounds.round_timeout)"
        if grace == "learned":
            wait = self._learned_wait(request, reached)
            if wait is not None and now - request.asked > wait:
                return f"no answer within {wait:.0f} s, by what was taken before (rounds.straggler_grace)"
        elif reached is not None and grace and now - reached > grace:
            return f"no answer within {grace:.0f} s of the others (rounds.straggler_grace)"
        return ""

    def _learned_wait(self, request: Request, reached: float | None) -> float | None:
        if request.kind == "describe":  # takes no training
            return learned_wait((), request.work)
        return None if reached is None else self._patience[request.kind].wait(request.site, request.work)

    def _give_up(self, request: Request, reason: str) -> None:
        request.fail(reason)
        if not request.gone:
            self._patience[request.kind].missed(request.site)
            asked = request.site, request.kind
            self._late = {t: late for t, late in self._late.items() if (late.site, late.kind) != asked}
            self._late[request.ticket] = request

    def _start_job(self, open_requests: Iterable[Request]) -> None:
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

    def _take(self, event: Envelope, requests: Sequence[Request]) -> None:
        """Handle one message of the job, and settle the request that it answers."""
        kind, ticket = event.header.get("kind"), event.header.get("ticket")
        if kind == "sites":
            self._reaches(event.header.get("sites"))
            return
        request = next((request for request in requests if request.ticket == ticket), None)
        if request is None or request.settled:
            self.say(f"refused: a late or repeated answer of {said(event, 'site')}")
            self._learn_from_late(event)
            return
        if kind == "failed":
            request.gone = said(event, "reason")
            self.say(f"{request.site}: {request.gone}")
            return
        try:
            if kind == "oversized":
                raise InvalidMessage(said(event, "reason"))
            waiting = sum(len(other.body) for other in requests if other.body is not None)
            self._settle(request, read_answer(event, request, self.run), waiting)
        except InvalidMessage as error:
            self.say(f"refused: an answer of {said(event, 'site')}: {error}")
            request.fail(f"its answer is refused: {error}")
            return
        self._failures = 0
        self._absent.discard(request.site)

    def _learn_from_late(self, event: Envelope) -> None:
        """Note how long an answer took that came after its round, so that the next is waited for."""
        request = self._late.pop(str(event.header.get("ticket")), None)
        with suppress(InvalidMessage):
            if request and read_answer(event, request, self.run).header["kind"] in ("update", "evaluation"):
                self._heard(request)

    def _heard(self, request: Request) -> None:
        seconds = time.monotonic() - request.start
        self._patience[request.kind].heard(request.site, request.work, seconds)

    def _reaches(self, sites: Any) -> None:
        """Note which sites the job reaches."""
        are_names = isinstance(sites, list) and all(isinstance(site, str) for site in sites)
        if are_names and self.engine_jobs.current is not None:
            self.engine_jobs.current.sites = set(sites)

    def _settle(self, request: Request, answer: Envelope, waiting: int) -> None:
        """Take what the site answers, while so many bytes of other answers wait in memory.

        Raises:
            InvalidMessage: it describes itself in wrong types or numbers.
        """
        kind = answer.header["kind"]
        if kind == "lacking":
            self.say(f"{request.site}: {said(answer, 'reason')}; it is sent the whole plan")
            request.ticket, request.addition, request.sent = new_ticket(), False, False
        elif kind == "description":
            self._known[request.site] = Description.read(answer.header, "description")
            request.answered = True
        elif kind in ("update", "evaluation", "sum"):
            if waiting + len(answer.body) <= ANSWER_MEMORY:
                request.body = answer.body
            else:
                store(request.answer_path, answer.body)
            request.steps, request.answered = progress(answer), True
            if not request.answered_before:
                self._heard(request)
        else:
            prefix = "the site refuses: " if kind == "refused" else ""
            request.fail(f"{prefix}{said(answer, 'reason')}")
        request.seconds = time.monotonic() - request.start

    def _rejoin(self, open_requests: Sequence[Request]) -> None:
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

    def _readmit(self, requests: Sequence[Request]) -> None:
        """End the current job if it lacks a site that is back, so that the next job reaches it."""
        job = self.engine_jobs.current
        lacking = {request.site for request in requests} - (job.sites if job else set())
        if job is None or not job.sites or not lacking:
            return
        if lacking & (self.engine.connected() or set()):
            self.engine_jobs.stop()


def _answer(request: Request, on_step: OnStep) -> Answer:
    """Take the answer from memory or from disk, and show the steps that it tells."""
    if not request.answered:
        return Answer(b"", request.failure, request.seconds, request.bytes_down)
    steps, tokens = request.steps
    for _ in range(steps):
        on_step(tokens)
    return Answer(request.take_body(), "", request.seconds, request.bytes_down)
