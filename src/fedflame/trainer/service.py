"""The trainer's service: it accepts or refuses a plan, carries it out once, and keeps its last answer.

An answer is identified by run and plan. After a crash of the engine or of the trainer, the same request gets
the same bytes: from the state folder or, if that holds a later answer by then, by training again from the
same seeds.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fedflame.atomic_file import write_atomically
from fedflame.base.device import choose_device
from fedflame.base.memory_limit import memory_limit
from fedflame.clients.local import reason
from fedflame.errors import InvalidMessage
from fedflame.messages import ClientEvaluation, ClientUpdate, RoundPlan
from fedflame.privacy.noise import Noise
from fedflame.privacy.terms import Terms
from fedflame.trainer.budget import require_within_budget
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.journal import Journal
from fedflame.trainer.ledger import Round, begin_round
from fedflame.trainer.model import SiteModel
from fedflame.trainer.private_rounds import release_key, required_terms, site_noise
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.rows import load_site_rows, require_tests, units_of
from fedflame.trainer.site import Site
from fedflame.trainer.sums import masked_update, ready, require_summed_with_peers
from fedflame.trainer.work import Work
from fedflame.wire.addition import decode_addition, plan_digest
from fedflame.wire.codec import decode_evaluation, decode_evaluation_plan, decode_plan, decode_update
from fedflame.wire.envelope import LONGEST_BODY, Envelope

_RUN = re.compile(r"[0-9a-f]{32}")
_DIGEST_LENGTH = 32
"""Letters of the digest with which a stored answer begins."""
_Decoded = TypeVar("_Decoded", ClientUpdate, ClientEvaluation)


class TrainerService:
    """Answers requests for one site. It holds at most one model; several threads may call it."""

    def __init__(self, site: Site, say: Callable[[str], None]) -> None:
        """Choose the site's device and read its rows.

        Args:
            site: the settings of the site's file.
            say: called with each line for the log.

        Raises:
            UserError: the device cannot be used, or the data cannot be read or has no usable row.
        """
        self._site, self._say = site, say
        self.device = choose_device(site.trainer.device, "trainer.device")
        self._rows = load_site_rows(site)
        self.skipped = self._rows.skipped
        self._model = SiteModel(site, self._rows, self.device, say)
        self._work = Work(site, self._model, self.device)
        self._working = threading.Lock()
        self._journal = Journal(site.state_path)
        self._units = units_of(self._rows.training)

    @property
    def num_examples(self) -> int:
        """The number of rows that the site trains on."""
        return self._model.num_examples

    @property
    def test_rows(self) -> int:
        """The number of rows that the hub may have scored here; 0 if it may have none scored."""
        try:
            require_tests(len(self._rows.tests), self._site)
        except Refusal:
            return 0
        return len(self._rows.tests)

    @property
    def longest_request(self) -> int:
        """The most bytes of a plan. While it is read, there are several copies of it in memory."""
        memory = self._site.limits.max_memory * 1e9 or memory_limit()
        return min(LONGEST_BODY, int(memory) // 4)

    def answer(self, request: Envelope) -> Envelope:
        """Answer a request. An error becomes an answer of kind "refused" or "failed", never an exception."""
        echoed = {name: request.header.get(name) for name in ("ticket", "run")} | {"site": self._site.name}
        try:
            header, body = self._answer(request)
        except InvalidMessage as error:
            header, body = {"kind": "refused", "reason": str(error)}, b""
        except Exception as error:
            header, body = {"kind": "failed", "reason": reason(error)}, b""
        if "reason" in header:
            self._say(f"{header['kind']}: {header['reason']}")
        if header["kind"] in ("refused", "failed"):
            run = str(echoed["run"])
            self._journal.refusal(header["kind"], run if _RUN.fullmatch(run) else "", header["reason"])
        return Envelope(echoed | header, body)

    def _answer(self, request: Envelope) -> tuple[dict[str, Any], bytes]:
        kind, run = request.text("kind"), request.text("run")
        if request.text("site") != self._site.name:
            raise Refusal(f"this is {self._site.name}; the request is for {request.text('site')}")
        if not _RUN.fullmatch(run):
            raise InvalidMessage(f"run is {run[:40]!r}; 32 hexadecimal digits are needed")
        if kind == "describe":
            return {
                "kind": "description",
                "num_examples": self.num_examples,
                "active_experts": self._site.trainer.active_experts,
                "max_active_experts": self._site.most_experts,
                "test_rows": self.test_rows,
                "held": plan_digest(self._held(run)),
            }, b""
        if kind == "sum":
            return self._sum(run, bytes(request.body))
        if kind not in ("train", "evaluate"):
            raise InvalidMessage(f"request of kind {kind!r}; describe, train, evaluate and sum are known")
        job, message = TrainingJob.read(request.header.get("job"), "job"), bytes(request.body)
        if request.truth("addition"):
            try:
                message = decode_addition(message, self._held(run))
            except InvalidMessage as error:
                return {"kind": "lacking", "reason": str(error)}, b""
        answer = (self._train if kind == "train" else self._evaluate)(run, job, message)
        # A lost or damaged copy does no harm, because the hub then sends the whole plan. So the write is not
        # atomic, and a full disk is ignored.
        with suppress(OSError):
            self._held_path(run).write_bytes(message)
        return answer

    def _held_path(self, run: str) -> Path:
        return self._site.state_path / run / "plan"

    def _held(self, run: str) -> bytes:
        """Return the last plan of the run that was answered; empty if there is none."""
        try:
            return self._held_path(run).read_bytes()
        except OSError:
            return b""

    def _train(self, run: str, job: TrainingJob, message: bytes) -> tuple[dict[str, Any], bytes]:
        plan = decode_plan(message)
        require_summed_with_peers(self._site, plan)
        self._work.require_training_allowed(job, plan)
        terms = required_terms(self._site, plan, len(self._units))
        known, digest = self._site.state_path / run / "answer", _digest(message, job)
        at = f"run {run[:8]} round {plan.round}"
        with self._working:
            answer = _remembered(known, digest, lambda update: decode_update(update, plan))
            if answer is None:
                start = time.monotonic()
                noise = self._begin(run, digest, plan, terms)
                self._make_room(run)
                self._say(f"{at}: training with k={plan.active_experts}")
                update = self._work.train(job, plan, known.parent, self._units, noise)
                write_atomically(known, digest.encode() + update)
                learned = decode_update(update, plan)
                answer, seconds = (update, learned), time.monotonic() - start
                self._journal.update(
                    run, plan.round, plan.active_experts, learned.steps, learned.tokens, seconds
                )
                self._say(f"{at}: trained in {seconds:.1f} s")
            else:
                self._say(f"{at}: answered again")
        update, learned = answer
        if plan.secure_aggregation:
            return {"kind": "update"}, ready(self._site, run, learned)
        return {"kind": "update", "steps": learned.steps, "tokens": learned.tokens}, update

    def _sum(self, run: str, message: bytes) -> tuple[dict[str, Any], bytes]:
        with self._working:
            try:
                answer = (self._site.state_path / run / "answer").read_bytes()[_DIGEST_LENGTH:]
            except OSError as error:
                raise Refusal(f"run {run[:8]}: this site has no update that waits for a sum") from error
            body = masked_update(self._site, run, message, self._held(run), answer)
        self._say(f"run {run[:8]}: its update is in a masked sum")
        return {"kind": "sum"}, body

    def _begin(self, run: str, digest: str, plan: RoundPlan, terms: Terms | None) -> Noise | None:
        """Record a round in the ledger before it is trained; return the draws of a private one."""
        state, limits = self._site.state_path, self._site.limits
        begun = Round(run, digest, time.time())
        if terms is None:
            begin_round(state, begun, limits)
            return None
        key = release_key(digest, self._rows.training, self.device.name)
        spent = terms.sampling_rate, terms.noise_multiplier, plan.max_steps
        begun = Round(run, key, begun.time, "train", self._site.dataset, *spent)
        budget = plan.private_steps, len(self._units), self._site.privacy
        begin_round(state, begun, limits, lambda rounds: require_within_budget(rounds, begun, *budget))
        return site_noise(state, run, key)

    def _evaluate(self, run: str, job: TrainingJob, message: bytes) -> tuple[dict[str, Any], bytes]:
        plan, rows = decode_evaluation_plan(message), len(self._rows.tests)
        require_tests(rows, self._site)
        self._work.require_scoring_allowed(job, plan, rows)
        known, digest = self._site.state_path / run / "scores", _digest(message, job)
        at = f"run {run[:8]} round {plan.round}"
        with self._working:
            answer = _remembered(known, digest, decode_evaluation)
            if answer is None:
                start = time.monotonic()
                begin_round(
                    self._site.state_path, Round(run, digest, time.time(), "evaluate"), self._site.limits
                )
                self._make_room(run)
                self._say(f"{at}: scoring {rows:,} rows with k={plan.active_experts}")
                sums = self._work.score(job, plan)
                write_atomically(known, digest.encode() + sums)
                answer, seconds = (sums, decode_evaluation(sums)), time.monotonic() - start
                tokens = answer[1].response_tokens
                self._journal.evaluation(run, plan.round, plan.active_experts, tokens, seconds)
                self._say(f"{at}: scored in {seconds:.1f} s")
            else:
                self._say(f"{at}: scores answered again")
        return {"kind": "evaluation"}, answer[0]

    def _make_room(self, run: str) -> None:
        """Remove the state of the oldest runs (`trainer.kept_runs`), since no run reports its end."""
        state = self._site.state_path
        others = [path for path in state.glob("*") if _RUN.fullmatch(path.name) and path.name != run]
        others.sort(key=lambda path: path.stat().st_mtime)  # a run's folder changes in every round
        for old in others[: max(0, len(others) + 1 - self._site.trainer.kept_runs)]:
            self._say(f"run {old.name[:8]}: its state is removed (trainer.kept_runs)")
            shutil.rmtree(old, ignore_errors=True)


def _digest(message: bytes, job: TrainingJob) -> str:
    whole = message + job.model_dump_json().encode()
    return hashlib.blake2b(whole, digest_size=_DIGEST_LENGTH // 2).hexdigest()


def _remembered(
    path: Path, digest: str, decode: Callable[[bytes], _Decoded]
) -> tuple[bytes, _Decoded] | None:
    """Return the stored answer, encoded and decoded, or None if it is for another plan or damaged."""
    try:
        content = path.read_bytes()
        known, answer = content[: len(digest)], content[len(digest) :]
        if known != digest.encode():
            return None
        return answer, decode(answer)
    except (OSError, InvalidMessage):
        return None
