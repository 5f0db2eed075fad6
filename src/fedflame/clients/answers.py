"""The interface between the rounds and the clients: encoded plans go in, encoded updates come back.

Plans and updates are bytes here because an engine carries bytes. So a run in one process uses the same codec
as a run over sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedflame.messages import ClientUpdate
from fedflame.wire.envelope import Bytes

OnStep = Callable[[int], None]
"""Called after every batch with the number of its tokens."""


@dataclass(frozen=True)
class Answer:
    """A client's answer to a plan."""

    update: Bytes
    """The encoded `ClientUpdate`, or `ClientEvaluation`; empty if the client failed."""
    failure: str
    """Why there is none; empty if there is one."""
    seconds: float
    """Time from the plan to the answer."""
    bytes_down: int | None = None
    """Bytes sent to the client; None means the encoded plan, once."""
    step_losses: Sequence[float] = ()
    """Loss of each optimizer step; empty at sites, which do not tell it: a step is a few rows."""


class Clients(Protocol):
    """The clients of a run: in this process, in worker processes, or at sites."""

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        """Yield one answer per pair of client and encoded `RoundPlan`, in order; take pairs when needed."""

    def evaluate(self, plans: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        """Yield one answer per pair of client and encoded `EvaluationPlan`, as `train` does."""

    def test_rows(self) -> Sequence[int | None]:
        """Return the number of rows that each client holds to score; None if it did not say."""

    def num_examples(self) -> Sequence[int]:
        """Return the number of rows of each client; 0 if that is not known yet."""

    def believed_rows(self, client: int) -> int:
        """Return the rows of a client as far as they are believed; the most that are, if it did not say."""

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        """Return an accepted update with those weights that are believed of its client."""

    def name(self, client: int) -> str:
        """Return the name of this client in messages."""


class SummingClients(Clients, Protocol):
    """Clients whose updates are told in masked sums alone: `train` yields an encoded `Ready` of each."""

    run: str
    """32 hexadecimal digits."""

    def sums(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        """Yield the masked contribution of each client, for an encoded `SumRequest`, in order."""
