"""What the rounds know of clients: encoded plans go in, encoded updates come back.

Bytes are what an engine carries, too, so that a run in one process and a run over sites go through the same
codec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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
