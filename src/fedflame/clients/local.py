"""Clients in this process: they train one after another on one shared base model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedflame.base.out_of_memory import training_memory_in_words
from fedflame.clients.answers import Answer, OnStep
from fedflame.data.encoding import EncodedRow
from fedflame.errors import InvalidMessage, OutOfMemory, UserError, one_line
from fedflame.messages import ClientUpdate
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.error_feedback import Residuals, encode_with_feedback
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.codec import decode_plan


@dataclass(frozen=True)
class LocalClients:
    """All clients in this process, with one shared base model."""

    adapted: AdaptedModel
    rows: Sequence[Sequence[EncodedRow]]
    pad_token_id: int
    residuals: Residuals
    names: Sequence[str] = ()
    """Of the clients, if they have names."""

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        for _, plan in plans:
            yield self.answer(plan, on_step)

    def num_examples(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def believed_rows(self, client: int) -> int:
        return len(self.rows[client])

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        return update

    def name(self, client: int) -> str:
        return self.names[client] if self.names else f"client {client}"

    def answer(self, plan: bytes, on_step: OnStep) -> Answer:
        """Train the plan's client. Its error becomes the answer's `failure`, so that the round can go on.

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
            request = decode_plan(plan)
            rows, adapted = self.rows[request.client], self.adapted
            with training_memory_in_words(adapted.model.device, request, adapted.gradient_checkpointing):
                update = fine_tune(adapted, rows, request, self.pad_token_id, told, losses.extend)
            message = encode_with_feedback(update, request, self.residuals)
            return Answer(message, "", time.monotonic() - start, step_losses=losses)
        except Exception as error:
            if isinstance(error, OutOfMemory) or error in of_caller:
                raise
            return Answer(b"", reason(error), time.monotonic() - start)


def reason(error: Exception) -> str:
    """Return the error as one line for the log."""
    name = "" if isinstance(error, InvalidMessage | UserError) else f"{type(error).__name__}: "
    return one_line(f"{name}{error}")
