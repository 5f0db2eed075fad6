"""The trainer's service: it accepts or refuses a plan, trains once, and keeps its last answer.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedflame.atomic_file import write_atomically
from fedflame.base.adapted import load_adapted_model
from fedflame.base.card_memory import require_room, spread_if_needed, training_need, training_words
from fedflame.base.device import DeviceChoice, choose_device, device_in_words
from fedflame.base.files import model_config_path, model_digest
from fedflame.base.memory_limit import memory_limit
from fedflame.base.out_of_memory import training_memory_in_words
from fedflame.clients.local import reason
from fedflame.config.sections import DataConfig
from fedflame.cost.flops import training_flops_per_token
from fedflame.cost.model_shape import ModelShape, read_model_shape
from fedflame.cost.refused_families import require_balanced, require_packable
from fedflame.data.conversations import Conversation
from fedflame.data.encoder import Encoder, new_encoder, pad_token
from fedflame.data.encoding import EncodedRow, encode_rows, require_known_ids
from fedflame.data.rows import SkippedRow, load_rows
from fedflame.errors import InvalidMessage
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.trainer.disclosure import disclosed
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.journal import Journal
from fedflame.trainer.ledger import begin_round
from fedflame.trainer.limits import (
    largest_batch,
    memory_needed,
    require_allowed,
    require_enough,
    require_memory,
    time_limit,
)
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.site import Site
from fedflame.training.error_feedback import Residuals, encode_with_feedback
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.addition import decode_addition, plan_digest
from fedflame.wire.codec import decode_plan, decode_update
from fedflame.wire.envelope import LONGEST_BODY, Envelope

_RUN = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class _Ready:
    """A job with its loaded model, tokenizer and encoded rows."""

    job: TrainingJob
    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[EncodedRow]


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
        self._rows, self.skipped = _load_rows(site)
        self._ready: _Ready | None = None
        self._digests: dict[str, str] = {}
        self._training = threading.Lock()
        self._journal = Journal(site.state_path)

    @property
    def num_examples(self) -> int:
        """The number of rows that the site holds."""
        return len(self._rows)

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
                "held": plan_digest(self._held(run)),
            }, b""
        if kind != "train":
            raise InvalidMessage(f"request of kind {kind!r}; describe and train are known")
        job, message = TrainingJob.read(request.header.get("job"), "job"), bytes(request.body)
        if request.truth("addition"):
            try:
                message = decode_addition(message, self._held(run))
            except InvalidMessage as error:
                return {"kind": "lacking", "reason": str(error)}, b""
        answer = self._train(run, job, message)
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
        self._require_allowed(job, plan)
        known = self._site.state_path / run / "answer"
        digest = hashlib.blake2b(message + job.model_dump_json().encode(), digest_size=16).hexdigest()
        with self._training:
            answer = _remembered(known, digest, plan)
            if answer is None:
                start = time.monotonic()
                begin_round(self._site.state_path, run, digest, self._site.limits)
                self._make_room(run)
                self._say(f"run {run[:8]} round {plan.round}: training with k={plan.active_experts}")
                update = self._fine_tune(job, plan, known.parent)
                write_atomically(known, digest.encode() + update)
                learned = decode_update(update, plan)
                answer, seconds = (update, learned), time.monotonic() - start
                self._journal.update(
                    run, plan.round, plan.active_experts, learned.steps, learned.tokens, seconds
                )
                self._say(f"run {run[:8]} round {plan.round}: trained in {seconds:.1f} s")
            else:
                self._say(f"run {run[:8]} round {plan.round}: answered again")
        update, learned = answer
        return {"kind": "update", "steps": learned.steps, "tokens": learned.tokens}, update

    def _make_room(self, run: str) -> None:
        """Remove the state of the oldest runs (`trainer.kept_runs`), since no run reports its end."""
        state = self._site.state_path
        others = [path for path in state.glob("*") if _RUN.fullmatch(path.name) and path.name != run]
        others.sort(key=lambda path: path.stat().st_mtime)  # a run's folder changes in every round
        for old in others[: max(0, len(others) + 1 - self._site.trainer.kept_runs)]:
            self._say(f"run {old.name[:8]}: its state is removed (trainer.kept_runs)")
            shutil.rmtree(old, ignore_errors=True)

    def _fine_tune(self, job: TrainingJob, plan: RoundPlan, state: Path) -> bytes:
        on_step, limits = time_limit(self._site.limits), self._site.limits
        ready, checkpointing = self._loaded(job, plan), self._site.trainer.gradient_checkpointing
        self._require_memory(job, plan, largest_batch(plan, ready.rows))
        with training_memory_in_words(ready.adapted.model.device, plan, checkpointing):
            update = fine_tune(ready.adapted, ready.rows, plan, pad_token(ready.tokenizer), on_step)
        require_enough(limits, update)
        told, residuals = disclosed(update, limits.disclosure), Residuals(state / "residuals")
        return encode_with_feedback(told, plan, residuals, limits.max_update_norm)

    def _loaded(self, job: TrainingJob, plan: RoundPlan) -> _Ready:
        """Return the model with the job's adapter and the encoded rows; load them unless they are loaded."""
        if self._ready is None or self._ready.job != job:
            self._ready = None  # free it first: two models may not fit into memory
            device = self._place(job, plan)
            self._say(f"loading {job.model_name_or_path} in {job.dtype} onto {device_in_words(device)}")
            path = self._site.models[job.model_name_or_path]
            checkpointing = self._site.trainer.gradient_checkpointing
            adapted, tokenizer = load_adapted_model(path, job.dtype, job.adapter, checkpointing, device.name)
            encoder = self._encoder(job, tokenizer)
            rows = self._encoded(encoder)
            require_known_ids(rows, adapted.vocabulary, encoder)
            self._ready = _Ready(job, adapted, tokenizer, rows)
        return self._ready

    def _encoder(self, job: TrainingJob, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Return the encoder of the job. Raises Refusal if the chat template here is not the hub's."""
        data = DataConfig(
            chat_template_path=self._site.chat_template_path,
            assistant_only_loss=job.assistant_only_loss,
            completion_only_loss=job.completion_only_loss,
            train_on_eos=job.train_on_eos,
        )
        encoder = new_encoder(tokenizer, job.max_length, data)
        if encoder.template.digest != job.template_digest:
            raise Refusal(
                f"the chat template is another one here ({encoder.template.in_words}, digest "
                f"{encoder.template.digest[:8] or 'none'}; the hub's {job.template_digest[:8] or 'none'}); "
                "data.chat_template_path names one"
            )
        return encoder

    def _encoded(self, encoder: Encoder) -> list[EncodedRow]:
        """Return the rows that can be encoded. Raises Refusal if there is none."""
        encoded = encode_rows(self._rows, encoder)
        rows = [row for row in encoded if not isinstance(row, str)]
        if reasons := [row for row in encoded if isinstance(row, str)]:
            self._say(f"{len(reasons):,} of {len(encoded):,} rows cannot be used; the first: {reasons[0]}")
        if not rows:
            raise Refusal("none of the site's rows can be used; its log says why")
        return rows

    def _place(self, job: TrainingJob, plan: RoundPlan) -> DeviceChoice:
        """Return the site's device, all its cards if one is too small. Raises UserError if these are, too."""
        checkpointing = self._site.trainer.gradient_checkpointing
        batch = plan.tokens_per_step, plan.batch_size, plan.packed_length > 0
        work = training_words(plan.active_experts, *batch, checkpointing)
        need = training_need(self._shape(job), job.adapter, job.dtype, work, plan.holds_gradients)
        device = spread_if_needed(self.device, need)
        require_room(device, need)
        return device

    def _require_allowed(self, job: TrainingJob, plan: RoundPlan) -> None:
        """Raise Refusal if the site's file does not allow the job or the plan, before anything is loaded."""
        require_allowed(self._site, job, plan)
        self._require_same_model(job)
        if plan.packs:
            require_packable(self._shape(job).model_type)
        if plan.router_aux_loss_coef:
            require_balanced(self._shape(job).model_type)
        limits, tokens = self._site.limits, plan.most_tokens(plan.max_steps, job.max_length)
        if limits.max_flops and (flops := tokens * self._flops_per_token(job, plan)) > limits.max_flops:
            raise Refusal(
                f"the plan asks for {flops:.3g} FLOPs; this site allows at most {limits.max_flops:.3g}"
            )
        self._require_memory(job, plan, 0)

    def _require_memory(self, job: TrainingJob, plan: RoundPlan, batch_tokens: int) -> None:
        """Raise Refusal if a round with so many tokens in its largest batch takes more than allowed."""
        checkpointing = self._site.trainer.gradient_checkpointing
        needed = memory_needed(self._shape(job), job, plan, batch_tokens, checkpointing, self.device)
        require_memory(self._site.limits, self.device, needed)

    def _shape(self, job: TrainingJob) -> ModelShape:
        return read_model_shape(model_config_path(self._site.models[job.model_name_or_path]))

    def _require_same_model(self, job: TrainingJob) -> None:
        path = self._site.models[job.model_name_or_path]
        if path not in self._digests:
            self._digests[path] = model_digest(path)
        if self._digests[path] != job.model_digest:
            raise Refusal(
                f"model {job.model_name_or_path!r} is another one here ({path} has digest "
                f"{self._digests[path][:8]}, the hub's {job.model_digest[:8]})"
            )

    def _flops_per_token(self, job: TrainingJob, plan: RoundPlan) -> float:
        setting = (plan.adapter.rank, job.adapter.target_modules, plan.longest_sequence(job.max_length))
        return training_flops_per_token(self._shape(job), plan.active_experts, *setting).total


def _load_rows(site: Site) -> tuple[list[Conversation], list[SkippedRow]]:
    loaded = load_rows(dataset_name=site.dataset, **site.columns)
    return loaded.rows, loaded.skipped


def _remembered(path: Path, digest: str, plan: RoundPlan) -> tuple[bytes, ClientUpdate] | None:
    """Return the stored answer, encoded and decoded, or None if it is for another plan or damaged."""
    try:
        content = path.read_bytes()
        known, update = content[: len(digest)], content[len(digest) :]
        if known != digest.encode():
            return None
        return update, decode_update(update, plan)
    except (OSError, InvalidMessage):
        return None
