"""How long a round waits for a site that says nothing, by what sites took before. Knows no clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

TIMES = 3.0
"""How many times as long as before a site may take."""
LEAST_SECONDS = 600.0
"""What every site has: enough to start again and to load a model."""


@dataclass(frozen=True)
class Taken:
    """What one answer took."""

    work: float
    """Steps times experts per token that its plan asked for."""
    seconds: float


def learned_wait(taken: Iterable[Taken], work: float) -> float:
    """Return how long an answer of this much work is waited for, in seconds.

    That is `TIMES` the slowest that was taken, in proportion where the work is more, or `LEAST_SECONDS`. Less
    work is given as much time, since a part of a step takes as long with fewer experts.
    """
    slowest = max((each.seconds * max(1.0, work / each.work) for each in taken), default=0.0)
    return max(LEAST_SECONDS, TIMES * slowest)


@dataclass
class Patience:
    """What the sites of a run took so far, and how long each is waited for because of it."""

    _slowest: dict[str, dict[float, float]] = field(default_factory=dict)
    """Site -> work -> the most seconds that it took."""
    _never_heard: set[str] = field(default_factory=set)
    """Sites that were waited for to the end of a round, without any answer yet."""

    def heard(self, site: str, work: float, seconds: float) -> None:
        """Note what an answer of the site took, be it too late or not."""
        known = self._slowest.setdefault(site, {})
        known[work] = max(seconds, known.get(work, 0.0))

    def missed(self, site: str) -> None:
        """Note that the site was waited for in vain."""
        self._never_heard.add(site)

    def wait(self, site: str, work: float) -> float | None:
        """Return the seconds to wait for the site's answer; None: to the end of the round.

        A site counts by its own answers. The first that it owes is waited for to the end of a round, and
        where that was in vain, the later ones by the answers of the others.
        """
        if site in self._slowest:
            return learned_wait(self._taken(site), work)
        if site in self._never_heard:
            return learned_wait((each for other in self._slowest for each in self._taken(other)), work)
        return None

    def _taken(self, site: str) -> list[Taken]:
        return [Taken(work, seconds) for work, seconds in self._slowest[site].items()]
