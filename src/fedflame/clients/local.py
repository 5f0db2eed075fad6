"""Clients in this process: they train and score one after another on one shared base model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedflame.base.out_of_memory import memory_in_words, training_memory_in_words
from fedflame.clients.answers import Answer, OnStep
from fedflame.data.encoding import EncodedRow
from fedflame.errors import InvalidMessage, OutOfMemory, UserError, one_line
from fedflame.messages import ClientUpdate
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.privacy.noise import Noise, simulated_secret
from fedflame.training.error_feedback import Residuals, encode_with_feedback
from fedflame.training.evaluation import HeldOut
from fedflame.training.fine_tune import fine_tune
from fedflame.training.private import fine_tune_privately
from fedflame.training.score_tests import score_tests
from fedflame.wire.addition import plan_digest
from fedflame.wire.codec import asks_for_scores, decode_evaluation_plan, decode_plan, encode_evaluation


@dataclass(frozen=True)
class LocalClients:
    """All clients in this process, with one shared base model."""

    adapted: AdaptedModel
    rows: Sequence[Sequence[EncodedRow]]
    pad_token_id: int
    residuals: Residuals
    names: Sequence[str] = ()
    """Of the clients, if they have names."""
    tests: Sequence[HeldOut] = ()
    """The rows that each client is scored on; empty if none is asked to score."""

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        for _, plan in plans:
            yield self.answer(plan, on_step)

    def evaluate(self, plans: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        for _, plan in plans:
            yield self.answer(plan, lambda tokens: None)

    def test_rows(self) -> list[int | None]:
        return [len(tests.rows) for tests in self.tests]

    def num_examples(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def believed_rows(self, client: int) -> int:
        return len(self.rows[client])

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        return update

    def name(self, client: int) -> str:
        return self.names[client] if self.names else f"client {client}"

    def answer(self, plan: bytes, on_step: OnStep) -> Answer:
        """Have the plan's client train, or score its own rows: whatever the plan asks for.

        Its error becomes the answer's `failure`, so that the round can go on.

        A full memory is not the client's failure alone, and an error of `on_step` is not the client's at all:
        both are raised.
        """
        start = time.monotonic()
        of_caller: list[Exception] = []
        losses: list[float] = []

        def told(tokens: int) -> None:
            try:
                on_step(tokens)
            except Exception as error:
                of_caller.append(error)
                raise

        try:
            if asks_for_scores(plan):
                message = self._scored(plan, told)
            else:
                message = self._trained(plan, told, losses.extend)
            return Answer(message, "", time.monotonic() - start, step_losses=losses)
        except Exception as error:
            if isinstance(error, OutOfMemory) or error in of_caller:
                raise
            return Answer(b"", reason(error), time.monotonic() - start)

    def _trained(self, plan: bytes, on_step: OnStep, on_losses: Callable[[list[float]], None]) -> bytes:
        request = decode_plan(plan)
        rows, adapted = self.rows[request.client], self.adapted
        with training_memory_in_words(adapted.model.device, request, adapted.gradient_checkpointing):
            if request.is_private:
                noise = Noise(simulated_secret(request.seed, request.client), (plan_digest(plan),))
                update = fine_tune_privately(
                    adapted, [[row] for row in rows], request, self.pad_token_id, noise, on_step
                )
            else:
                update = fine_tune(adapted, rows, request, self.pad_token_id, on_step, on_losses)
        return encode_with_feedback(update, request, self.residuals)

    def _scored(self, plan: bytes, on_step: OnStep) -> bytes:
        request, adapted = decode_evaluation_plan(plan), self.adapted
        with memory_in_words(adapted.model.device, f"evaluating at k = {request.active_experts}", ""):
            return encode_evaluation(score_tests(adapted, self.tests[request.client], request, on_step))


def reason(error: Exception) -> str:
    """Return the error as one line for the log."""
    name = "" if isinstance(error, InvalidMessage | UserError) else f"{type(error).__name__}: "
    return one_line(f"{name}{error}")
