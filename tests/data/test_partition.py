from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflame.data.partition import (
    PartitionKind,
    _fill_empty_clients,
    _shares,
    by_owner,
    partition,
    partition_statistics,
)
from fedflame.errors import UserError

KINDS: tuple[PartitionKind, ...] = ("iid", "dirichlet", "by_label", "quantity")


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], int, PartitionKind, float, int]:
    labels = draw(st.lists(st.sampled_from(("a", "b", "c", "dd", "É")), min_size=1, max_size=60))
    num_clients = draw(st.integers(1, len(labels)))
    alpha = draw(st.sampled_from((1e-300, 1e-3, 0.1, 1.0, 1e6, 1e300)))
    return labels, num_clients, draw(st.sampled_from(KINDS)), alpha, draw(st.integers(0, 2**40))


@given(cases())
def test_every_row_once_and_no_client_empty(case: tuple[list[str], int, PartitionKind, float, int]) -> None:
    labels, num_clients, *_ = case
    parts = partition(*case)
    assert len(parts) == num_clients
    assert all(parts)
    assert all(part == sorted(part) for part in parts)
    assert sorted(row for part in parts for row in part) == list(range(len(labels)))
    assert all(type(row) is int for part in parts for row in part)  # for JSON
    assert parts == partition(*case)


@given(cases(), st.randoms(use_true_random=False))
def test_counts_do_not_depend_on_the_order_of_the_rows(
    case: tuple[list[str], int, PartitionKind, float, int], shuffler: random.Random
) -> None:
    labels, num_clients, kind, alpha, seed = case
    if kind in ("iid", "quantity"):
        return  # blind to labels
    shuffled = shuffler.sample(labels, len(labels))
    assert partition_statistics(
        labels, partition(labels, num_clients, kind, alpha, seed)
    ) == partition_statistics(shuffled, partition(shuffled, num_clients, kind, alpha, seed))


@given(cases())
def test_names_of_labels_matter_by_their_order_only(
    case: tuple[list[str], int, PartitionKind, float, int],
) -> None:
    labels, num_clients, kind, alpha, seed = case
    renamed = [f"label {sorted(set(labels)).index(label)}" for label in labels]
    assert partition(labels, num_clients, kind, alpha, seed) == partition(
        renamed, num_clients, kind, alpha, seed
    )


def test_same_partition_under_another_hash_seed() -> None:
    code = (
        "from fedflame.data.partition import partition;"
        "print(partition(list('abcdefgh') * 9, 5, 'dirichlet', 0.5, 7))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{partition(list('abcdefgh') * 9, 5, 'dirichlet', 0.5, 7)}\n"}


def test_no_global_generator_is_touched() -> None:
    np.random.seed(0)
    random.seed(0)
    expected = (np.random.random(), random.random())
    np.random.seed(0)
    random.seed(0)
    for kind in KINDS:
        partition(["a", "b"] * 20, 4, kind, 0.5, 1)
    assert (np.random.random(), random.random()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_differ(kind: PartitionKind) -> None:
    labels = ["a", "b"] * 30
    assert partition(labels, 4, kind, 0.5, 1) != partition(labels, 4, kind, 0.5, 2)


@pytest.mark.parametrize(("rows", "sizes"), [(10, [3, 3, 2, 2]), (4, [1, 1, 1, 1]), (12, [3, 3, 3, 3])])
def test_iid_sizes_differ_by_at_most_one(rows: int, sizes: list[int]) -> None:
    parts = partition(["a"] * rows, 4, "iid", 0.5, 0)
    assert sorted(map(len, parts), reverse=True) == sizes


def test_iid_mixes_the_rows() -> None:
    parts = partition(["a"] * 500 + ["b"] * 500, 4, "iid", 0.5, 0)
    for tally in partition_statistics(["a"] * 500 + ["b"] * 500, parts):
        assert 95 <= tally["a"] <= 155  # 125 expected, deviation 7.9


def test_by_label_with_more_labels_than_clients() -> None:
    labels = ["c", "a", "b", "a", "e", "d"]
    # Sorted labels a b c d e dealt to two clients: a c e, and b d.
    assert partition(labels, 2, "by_label", 0.5, 9) == [[0, 1, 3, 4], [2, 5]]


def test_by_label_with_more_clients_than_labels() -> None:
    labels = ["b", "a", "a", "a", "b", "b", "a", "a"]
    # Clients 0, 2 and 4 share a (5 rows), clients 1 and 3 share b (3 rows).
    parts = partition(labels, 5, "by_label", 0.5, 9)
    assert partition_statistics(labels, parts) == [
        {"a": 2, "b": 0},
        {"a": 0, "b": 2},
        {"a": 2, "b": 0},
        {"a": 0, "b": 1},
        {"a": 1, "b": 0},
    ]


def test_by_label_fills_an_empty_client_from_the_largest() -> None:
    labels = ["a", "b", "b", "b"]
    # a has one row for clients 0 and 2, so client 2 takes one of client 1's three.
    parts = partition(labels, 3, "by_label", 0.5, 0)
    assert partition_statistics(labels, parts) == [{"a": 1, "b": 0}, {"a": 0, "b": 2}, {"a": 0, "b": 1}]


def test_filling_takes_the_most_frequent_label_of_the_largest_client() -> None:
    counts = np.array([[0, 1, 2, 0], [0, 1, 3, 0]])
    _fill_empty_clients(counts)
    assert counts.tolist() == [[0, 1, 1, 1], [1, 1, 2, 0]]


def test_largest_remainder_by_hand() -> None:
    # 0.35, 4.55, 2.1: floors 0, 4, 2; the one row left goes to the largest remainder, 0.55.
    assert _shares(7, np.array([0.05, 0.65, 0.3])).tolist() == [0, 5, 2]
    # 2.5 twice: the first of equals.
    assert _shares(5, np.array([0.5, 0.5])).tolist() == [3, 2]


def test_dirichlet_splits_each_label_in_its_own_proportions() -> None:
    """Recomputed from the same draws, one per sorted label."""
    labels = ["b"] * 1000 + ["a"] * 400
    rng = np.random.default_rng(5)
    proportions = {name: rng.dirichlet([0.5] * 4) for name in ("a", "b")}
    parts = partition(labels, 4, "dirichlet", 0.5, 5)
    for client, tally in enumerate(partition_statistics(labels, parts)):
        assert abs(tally["a"] - 400 * proportions["a"][client]) < 1
        assert abs(tally["b"] - 1000 * proportions["b"][client]) < 1


def label_entropy(alpha: float, seed: int) -> float:
    """Mean entropy in nats of the clients' label distributions."""
    labels = [str(n % 5) for n in range(1000)]
    parts = partition(labels, 4, "dirichlet", alpha, seed)
    entropies = []
    for tally in partition_statistics(labels, parts):
        shares = np.array([count for count in tally.values() if count]) / sum(tally.values())
        entropies.append(-(shares * np.log(shares)).sum())
    return float(np.mean(entropies))


def test_smaller_alpha_is_more_skewed() -> None:
    low, middle, high = (np.mean([label_entropy(a, seed) for seed in range(20)]) for a in (0.05, 0.5, 50.0))
    assert low < middle - 0.3 < high - 0.6
    assert high == pytest.approx(np.log(5), abs=0.05)


def test_quantity_gives_unequal_numbers_of_rows_whatever_their_labels_are() -> None:
    """The sizes are one Dirichlet draw over all rows, by the largest remainder."""
    labels = ["a", "b"] * 500
    parts = partition(labels, 5, "quantity", 0.7, seed=3)
    drawn = np.random.default_rng(3).dirichlet(np.full(5, 0.7)) * len(labels)
    assert all(abs(len(part) - size) < 1 for part, size in zip(parts, drawn, strict=True))
    assert max(map(len, parts)) > 2 * min(map(len, parts))
    for part in parts:
        if len(part) > 100:
            assert 0.4 < sum(labels[row] == "a" for row in part) / len(part) < 0.6
    assert parts == partition(["c"] * 1000, 5, "quantity", 0.7, seed=3)


def test_rows_go_to_their_owners_in_the_given_order() -> None:
    assert by_owner(["b", "a", "b", "b"], ["a", "c", "b"]) == [[1], [], [0, 2, 3]]


def test_more_clients_than_rows_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        partition(["a", "b"], 3, "iid", 0.5, 0)
    assert str(caught.value) == (
        "clients.num_clients = 3: the data has 2 rows, and every client needs at least one"
    )


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 0.0, -1.0])
def test_alpha_outside_the_distribution_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match=r"^data\.alpha = .*: must be a finite number above 0$"):
        partition(["a"] * 4, 2, "dirichlet", alpha, 0)


def test_statistics_list_every_label_for_every_client() -> None:
    labels = ["b", "a", "b", "c"]
    assert partition_statistics(labels, [[0, 2, 3], [1]]) == [
        {"a": 0, "b": 2, "c": 1},
        {"a": 1, "b": 0, "c": 0},
    ]
    assert Counter(labels) == sum(map(Counter, partition_statistics(labels, [[0, 2, 3], [1]])), Counter())
