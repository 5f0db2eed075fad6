"""Partition the rows over the clients: IID, Dirichlet over labels, or by label.

The Dirichlet label skew follows Hsu, Qi, Brown (arXiv 1909.06335); we draw the proportions of the clients for
each label. Every kind gives each row to exactly one client, and every client at least one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedflame.errors import UserError

PartitionKind = Literal["iid", "dirichlet", "by_label", "quantity"]
_Counts = NDArray[np.int64]


def partition(
    labels: Sequence[str], num_clients: int, kind: PartitionKind, alpha: float, seed: int
) -> list[list[int]]:
    """Return the row indices of each client, ascending; each row belongs to exactly one client.

    How many rows of a label a client gets depends on the seed, the label counts and the sorted labels, but
    not on the order of the rows. A client without a row gets one row from the largest client, of that
    client's most frequent label.

    Args:
        labels: the label of every row.
        num_clients: the number of parts.
        kind: `iid`: the sizes differ by at most one. `dirichlet`: each label is split over the clients in
            proportions drawn from Dirichlet(alpha). `by_label`: the sorted labels are dealt to the clients in
            turn; with more clients than labels, clients with the same label share its rows. `quantity`: all
            rows alike are split in proportions drawn from Dirichlet(alpha), as the quantity skew of Li et al.
            (arXiv 2102.02079).
        alpha: concentration of the Dirichlet distribution; other kinds ignore it.
        seed: seed of all draws.

    Raises:
        UserError: there are more clients than rows, or alpha is not a finite number above 0.
    """
    if num_clients > len(labels):
        raise UserError(
            f"clients.num_clients = {num_clients}: the data has {len(labels)} rows, "
            "and every client needs at least one"
        )
    rng = np.random.default_rng(seed)
    if kind == "iid":
        shuffled = rng.permutation(len(labels))
        return [sorted(part.tolist()) for part in np.array_split(shuffled, num_clients)]
    rows_of: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    if kind == "quantity":
        rows_of = {"": list(range(len(labels)))}
    sizes = [len(rows) for rows in rows_of.values()]
    if kind in ("dirichlet", "quantity"):
        counts = _dirichlet_counts(sizes, num_clients, alpha, rng)
    else:
        counts = _by_label_counts(sizes, num_clients)
    _fill_empty_clients(counts)
    return _deal(list(rows_of.values()), counts, rng)


def by_owner(owners: Sequence[str], order: Sequence[str]) -> list[list[int]]:
    """Return the row indices of each owner in `order`, ascending; `owners` has that of every row."""
    parts: dict[str, list[int]] = {owner: [] for owner in order}
    for row, owner in enumerate(owners):
        parts[owner].append(row)
    return list(parts.values())


def partition_statistics(labels: Sequence[str], parts: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Return for each client label -> number of rows, with all labels in sorted order, even those with 0."""
    names = sorted(set(labels))
    tallies = [Counter(labels[row] for row in part) for part in parts]
    return [{name: tally[name] for name in names} for tally in tallies]


def _dirichlet_counts(
    sizes: Sequence[int], num_clients: int, alpha: float, rng: np.random.Generator
) -> _Counts:
    """Return the number of rows [labels, clients]."""
    if not (np.isfinite(alpha) and alpha > 0):
        raise UserError(f"data.alpha = {alpha}: must be a finite number above 0")
    concentration = np.full(num_clients, alpha)
    return np.stack([_shares(size, rng.dirichlet(concentration)) for size in sizes])


def _shares(size: int, proportions: NDArray[np.float64]) -> _Counts:
    """Split `size` into whole numbers by the largest remainder method."""
    exact = size * proportions
    counts = np.floor(exact).astype(np.int64)
    left = size - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1
    return counts


def _by_label_counts(sizes: Sequence[int], num_clients: int) -> _Counts:
    counts = np.zeros((len(sizes), num_clients), dtype=np.int64)
    for label, size in enumerate(sizes):
        clients = range(label % num_clients, num_clients, len(sizes))
        for place, client in enumerate(clients):
            counts[label, client] = size // len(clients) + (place < size % len(clients))
    return counts


def _fill_empty_clients(counts: _Counts) -> None:
    """Give each empty client a row of the largest, in place. There are at least as many rows as clients."""
    for client in np.flatnonzero(counts.sum(axis=0) == 0):
        largest = counts.sum(axis=0).argmax()
        label = counts[:, largest].argmax()
        counts[label, largest] -= 1
        counts[label, client] += 1


def _deal(rows_of: Sequence[list[int]], counts: _Counts, rng: np.random.Generator) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(counts.shape[1])]
    for rows, shares in zip(rows_of, counts, strict=True):
        pieces = np.split(rng.permutation(rows), np.cumsum(shares)[:-1])
        for part, piece in zip(parts, pieces, strict=True):
            part.extend(piece.tolist())
    return [sorted(part) for part in parts]
