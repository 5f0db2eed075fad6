"""What the scores of an attack prove: from canary rows of which each was in by the toss of a fair coin.

An attacker scores every canary, such as by how far its loss fell, and calls those with the highest scores in
and those with the lowest out. Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, arXiv
2305.08846.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

CONFIDENCE = 0.95
FALSE_POSITIVES = 0.01
_PARTS = (40, 20, 10, 6, 4, 3, 2)
"""One of so many canaries is guessed on each side. The best of these counts, tested as so many tries."""
_MOST_EPSILON = 16.0


@dataclass(frozen=True)
class Attack:
    """How well canaries that were in could be told from those that were not."""

    canaries: int
    auc: float
    """The chance that one that was in has the higher score; 0.5 by guessing."""
    true_positives: float
    """The share of those in that are found where 1 % of the others are found too."""
    proved_epsilon: float
    """A private run of a smaller epsilon gives such scores in less than 5 % of cases."""


def attack(scores: np.ndarray, inside: np.ndarray, delta: float) -> Attack:
    """Return what the scores [canaries] tell of which canaries were inside, bool [canaries]."""
    positive, negative = scores[inside], scores[~inside]
    above = (positive[:, None] > negative[None]).mean() + 0.5 * (positive[:, None] == negative[None]).mean()
    threshold = np.quantile(negative, 1 - FALSE_POSITIVES)
    found = float((positive > threshold).mean())
    return Attack(len(scores), float(above), found, proved_epsilon(scores, inside, delta))


def proved_epsilon(scores: np.ndarray, inside: np.ndarray, delta: float) -> float:
    """Return the largest epsilon that the scores refute, at `CONFIDENCE`; 0 if they refute none."""
    order, count = np.argsort(-scores, kind="stable"), len(scores)
    sizes = sorted({max(5, count // part) for part in _PARTS if 2 * max(5, count // part) <= count})
    level = (1 - CONFIDENCE) / max(1, len(sizes))
    best = 0.0
    for side in sizes:
        right = int(inside[order[:side]].sum() + (~inside[order[-side:]]).sum())
        low, high = 0.0, _MOST_EPSILON
        if p_value(count, 2 * side, right, 0.0, delta) > level:
            continue
        while high - low > 1e-3:
            middle = (low + high) / 2
            refuted = p_value(count, 2 * side, right, middle, delta) <= level
            low, high = (middle, high) if refuted else (low, middle)
        best = max(best, low)
    return best


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the largest chance of so many right guesses under (epsilon, delta)-privacy.

    Theorem 5.2 of arXiv 2305.08846.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    fewer = np.arange(1, right + 1)
    more = ((binom.sf(right - fewer - 1, guesses, chance) - tail) / fewer).max(initial=0.0)
    return min(1.0, tail + 2 * canaries * delta * max(0.0, float(more)))
