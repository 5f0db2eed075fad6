"""Records with loss and scores, and those of an evaluation at the clients."""

from __future__ import annotations

from dataclasses import dataclass


class Measured:
    """A record with `loss`, `exact_match` and `rouge_l`."""

    def value(self, name: str) -> float | None:
        """Return the measure of this name; None if it was not taken."""
        number: float | None = getattr(self, name)
        return number


@dataclass(frozen=True)
class ClientScore(Measured):
    """What one client told of the global model on rows of its own, after one round."""

    round: int
    client: int
    active_experts: int
    rank: int
    """LoRA rank that the client deploys."""
    rows: int
    response_tokens: int
    loss: float | None
    """Nats per response token."""
    exact_match: float | None
    """Share of rows, between 0 and 1."""
    rouge_l: float | None
    """Mean F-measure, between 0 and 1."""


@dataclass(frozen=True)
class TierScore(Measured):
    """The sum of what the clients of a tier told after one round, or of all if k and rank are None."""

    round: int
    active_experts: int | None
    rank: int | None
    clients: int
    """Clients in the sum."""
    rows: int
    response_tokens: int
    loss: float | None
    exact_match: float | None
    rouge_l: float | None


@dataclass(frozen=True)
class ScoreExclusion:
    """A client that was asked to score and is not in the sum."""

    round: int
    client: int
    active_experts: int
    reason: str
