"""Which k each client trains with in a round, where it may be less than its machine affords.

An adapter that is used with k experts per token has to be good with k, whoever has the rows. A client that
takes its turns with smaller k teaches its rows to the experts as smaller tiers use them, and one that takes
them with larger k, for fewer steps, teaches them to the larger tiers. This is ours, not the FLAME paper's,
where every client trains with the k that it affords in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

KRotation = Literal["none", "smaller", "all"]


def experts_of_round(afforded: Sequence[int], rotation: KRotation, round_number: int) -> list[int]:
    """The k of each client in a round, counted from 1.

    Clients that afford the same take their turns one after the other, so that in each round half of them
    train with what they afford.

    Args:
        afforded: k_i of each client, in client order.
        rotation: `none`: k_i; `smaller`: k_i in every second turn, between them the smaller k of other
            clients, one after the other; `all`: between them every other k of other clients, but for those
            with the smallest k, which keep to it.
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
    if rotation == "none":
        return [k]
    upwards = rotation == "all" and k > min(afforded)
    others = sorted({other for other in afforded if other < k or (upwards and other > k)}, reverse=True)
    return [turn for other in others for turn in (k, other)] or [k]
