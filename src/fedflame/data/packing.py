"""Pack rows into sequences of a limited length: several short rows share one, and no row is divided.

Best-fit decreasing, which TRL calls `bfd`: the longest row first, each into the sequence that it leaves the
least room in. It needs at most 11/9 of the fewest sequences possible, plus 4 (Johnson, Demers, Ullman, Garey,
Graham: Worst-case performance bounds for simple one-dimensional packing algorithms, SIAM J. Comput. 3, 1974).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return sequences of row indices, each row in one of them, its longest row first.

    Args:
        lengths: the tokens of each row, at least 1. Of rows of one length, the first comes first.
        capacity: the most tokens of a sequence. A row that is longer has a sequence of its own.
    """
    sequences: list[list[int]] = []
    with_room: defaultdict[int, list[list[int]]] = defaultdict(list)
    rooms: list[int] = []  # the keys of `with_room` that have sequences, rising
    for index in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect_left(rooms, lengths[index])
        if place == len(rooms):
            room, sequence = capacity, list[int]()
            sequences.append(sequence)
        else:
            room = rooms[place]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[place]
        sequence.append(index)
        left = room - lengths[index]
        if left > 0:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(sequence)
    return sequences
