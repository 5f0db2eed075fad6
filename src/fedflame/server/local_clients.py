"""Clients of this process: plans in, updates out, as bytes, one client after another.

`rounds` knows clients by `Clients` alone. Bytes are what travels on an engine too, so that a run in
process and a run over a wire go through the same codec.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from fedflame.base_model import load_base_model
from fedflame.client import fine_tune
from fedflame.config import RunConfig
from fedflame.data.batches import EncodedRow
from fedflame.error_feedback import Residuals, encode_with_feedback
from fedflame.errors import InvalidMessage, UserError
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.moe.read_ahead import read_ahead
from fedflame.wire.codec import decode_plan
from fedflame.wire.envelope import Bytes

OnStep = Callable[[int], None]
"""Told the tokens of every optimizer step."""


@dataclass(frozen=True)
class Answer:
    """What came back for a plan."""

    update: Bytes
    """The encoded `ClientUpdate`; empty if the client failed."""
    failure: str
    """Why there is no update, or empty."""
    seconds: float
    """From the plan to the answer."""
    bytes_down: int | None = None
    """What was sent for it; None for the encoded plan, once."""


class Clients(Protocol):
    """Where plans are carried out: here, in worker processes, or on an engine."""

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        """One answer per client and encoded `RoundPlan`, in their order; they are taken when needed."""

    def num_examples(self) -> Sequence[int]:
        """Rows of each client; 0 where that is not known yet."""

    def name(self, client: int) -> str:
        """What messages call this client."""


@dataclass(frozen=True)
class LocalClients:
    """All clients in this process, sharing one resident base model."""

    adapted: AdaptedModel
    rows: Sequence[Sequence[EncodedRow]]
    pad_token_id: int
    residuals: Residuals

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        for _, plan in plans:
            yield self.answer(plan, on_step)

    def num_examples(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def name(self, client: int) -> str:
        return f"client {client}"

    def answer(self, plan: bytes, on_step: OnStep) -> Answer:
        """Train the plan's client. Whatever goes wrong in a client, the round goes on without it."""
        start = time.monotonic()
        try:
            request = decode_plan(plan)
            update = fine_tune(self.adapted, self.rows[request.client], request, self.pad_token_id, on_step)
            message = encode_with_feedback(update, request, self.residuals)
            return Answer(message, "", time.monotonic() - start)
        except Exception as error:
            return Answer(b"", reason(error), time.monotonic() - start)


def reason(error: Exception) -> str:
    """One line for the log."""
    return str(error) if isinstance(error, InvalidMessage | UserError) else f"{type(error).__name__}: {error}"


def load_adapted_model(config: RunConfig, dtype: str) -> tuple[AdaptedModel, PreTrainedTokenizerBase]:
    """The configured base model in this dtype with its adapter attached, and its tokenizer.

    Raises:
        UserError: see `load_base_model` and `AdaptedModel`.
    """
    model, tokenizer = load_base_model(config.model.model_name_or_path, dtype, config.model.memory_map)
    adapted = AdaptedModel(
        model,
        config.adapter.r,
        config.adapter.lora_alpha,
        config.adapter.attention_modules(),
        config.training.gradient_checkpointing,
    )
    if config.model.memory_map:
        read_ahead(adapted.layers)
    return adapted, tokenizer
