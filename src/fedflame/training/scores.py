"""Scores of held-out rows: sums that add up over rows and categories. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """Sums over rows. `+` adds two sums; the properties are the means."""

    rows: int
    loss_sum: float
    """Sum over all response tokens, in nats."""
    response_tokens: int
    exact_matches: int | None = None
    """Rows answered exactly; None if no answer was generated."""
    rouge_l_sum: float | None = None
    """Sum of the rows' ROUGE-L F-measures, each from 0 to 1; None if no answer was generated."""

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            self.rows + other.rows,
            self.loss_sum + other.loss_sum,
            self.response_tokens + other.response_tokens,
            None if self.exact_matches is None else self.exact_matches + (other.exact_matches or 0),
            None if self.rouge_l_sum is None else self.rouge_l_sum + (other.rouge_l_sum or 0.0),
        )

    @property
    def loss(self) -> float:
        """Mean loss in nats per response token."""
        return self.loss_sum / self.response_tokens

    @property
    def exact_match(self) -> float | None:
        """Share of rows answered exactly, between 0 and 1."""
        return None if self.exact_matches is None else self.exact_matches / self.rows

    @property
    def rouge_l(self) -> float | None:
        """Mean ROUGE-L F-measure (Lin 2004), between 0 and 1."""
        return None if self.rouge_l_sum is None else self.rouge_l_sum / self.rows

    def to_json(self) -> dict[str, float | int | None]:
        """Return the means, and the numbers of rows and tokens, as plain values."""
        return {
            "loss": self.loss,
            "exact_match": self.exact_match,
            "rouge_l": self.rouge_l,
            "rows": self.rows,
            "response_tokens": self.response_tokens,
        }


def total(scores: dict[str, Scores]) -> Scores:
    """Return the scores of all categories together."""
    first, *rest = scores.values()
    return sum(rest, first)
