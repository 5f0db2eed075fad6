"""Which k each client trains with in a round, where it may be less than its machine affords.

An adapter that is used with k experts per token has to be good with k, whoever has the rows. A client that
takes its turns with smaller k teaches its rows to the experts as smaller tiers use them. This is ours, not
the FLAME paper's, where every client trains with the k that it affords in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

KRotation = Literal["none", "min", "all"]


def experts_of_round(afforded: Sequence[int], rotation: KRotation, round_number: int) -> list[int]:
    """The k of each client in a round, counted from 1; never more than it affords.

    Clients that afford the same take their turns one after the other, so that each k has clients in each
    round where there are enough of them.

    Args:
        afforded: k_i of each client, in client order.
        rotation: `none`: k_i; `min`: k_i and the smallest of all in turn; `all`: every k of the clients that
            is at most k_i in turn.
        round_number: from 1.
    """
    by_k = sorted(range(len(afforded)), key=lambda client: -afforded[client])
    chosen = [0] * len(afforded)
    for place, client in enumerate(by_k):
        turns = _turns(afforded[client], afforded, rotation)
        chosen[client] = turns[(round_number - 1 + place) % len(turns)]
    return chosen


def _turns(k: int, afforded: Sequence[int], rotation: KRotation) -> list[int]:
    """The k that one client trains with, in the order of its turns, its own first."""
    tiers = {"none": [k], "min": [k, min(afforded)], "all": [other for other in afforded if other <= k]}
    return sorted(set(tiers[rotation]), reverse=True)
