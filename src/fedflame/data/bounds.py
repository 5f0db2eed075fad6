"""Who trains on the rows: each client on its own; for the bounds of a comparison, one alone or one on all."""

from __future__ import annotations

from collections.abc import Sequence


def trained_parts(parts: Sequence[Sequence[int]], trained_by: str) -> list[list[int]]:
    """Return for each client the rows that it trains on; what is held out of them is the same in any case.

    Args:
        parts: for each client, the numbers of its own rows.
        trained_by: `one`: the first client, on the rows of all; or the number of a client: that one alone, on
            its own rows.
    """
    if trained_by == "one":
        return [sorted(row for part in parts for row in part), *([] for _ in parts[1:])]
    return [list(part) if client == int(trained_by) else [] for client, part in enumerate(parts)]
