"""Long series in few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def in_spans(values: Sequence[float], most: int) -> list[float]:
    """Return the means of at most so many equal spans of the values, or the values if they are no more."""
    count = min(len(values), most)
    edges = [len(values) * span // count for span in range(count + 1)] if count else [0]
    return [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(edges)]
