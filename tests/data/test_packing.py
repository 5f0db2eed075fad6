"""Best-fit decreasing against a slow one and against the fewest sequences possible; packed batches."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import END, PAD

from fedflame.data.batches import Batch, collate, collate_packed, training_batches
from fedflame.data.encoding import EncodedRow
from fedflame.data.packing import best_fit_decreasing

some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120)
capacities = st.integers(1, 100)


def totals(sequences: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[row] for row in sequence) for sequence in sequences]


def slowly_packed(lengths: list[int], capacity: int) -> list[int]:
    """The tokens of the sequences by the rule, looking at all of them for every row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


@given(some_lengths, capacities)
def test_every_row_is_in_one_sequence_and_no_sequence_of_several_is_too_long(
    lengths: list[int], capacity: int
) -> None:
    sequences = best_fit_decreasing(lengths, capacity)
    assert sorted(itertools.chain(*sequences)) == list(range(len(lengths)))
    pairs = zip(sequences, totals(sequences, lengths), strict=True)
    assert all(total <= capacity or len(sequence) == 1 for sequence, total in pairs)
    assert best_fit_decreasing(lengths, capacity) == sequences


@given(some_lengths, capacities)
def test_sequences_are_as_full_as_by_the_rule(lengths: list[int], capacity: int) -> None:
    found = totals(best_fit_decreasing(lengths, capacity), lengths)
    assert sorted(found) == slowly_packed(lengths, capacity)


def fewest(lengths: list[int], capacity: int) -> int:
    """The fewest sequences, of all ways to give each row to a sequence."""
    best = len(lengths)

    def place(row: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if row == len(lengths):
            best = len(rooms)
            return
        for index, room in enumerate(rooms):
            if room >= lengths[row]:
                place(row + 1, [*rooms[:index], room - lengths[row], *rooms[index + 1 :]])
        place(row + 1, [*rooms, capacity - lengths[row]])

    place(0, [])
    return best


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_it_needs_at_most_11_9_of_the_fewest_sequences(lengths: list[int]) -> None:
    """First-fit decreasing has the bound 11/9 n + 6/9 (Dosa, 2007), and best-fit is held to it here."""
    assert 9 * len(best_fit_decreasing(lengths, 20)) <= 11 * fewest(lengths, 20) + 6


def test_packing_by_hand() -> None:
    # 7 opens, 6 opens, 4 fits 6 exactly, 3 fits 7 exactly, 2 opens, 1 joins it; 12 is alone.
    assert best_fit_decreasing([2, 3, 7, 12, 6, 1, 4], 10) == [[3], [2, 1], [4, 6], [0, 5]]
    # The fuller of two sequences takes the row, though the other came first.
    assert best_fit_decreasing([5, 6, 3], 9) == [[1, 2], [0]]
    assert best_fit_decreasing([6, 7, 2], 9) == [[1, 2], [0]]


# Batches


def row(number: int, length: int, prompt: int = 1) -> EncodedRow:
    """A row whose first token says which it is."""
    return EncodedRow([100 + number] + [5] * (length - 1), prompt, False)


def row_numbers(batch: Batch) -> list[int]:
    """The rows by their first tokens, found by position and not by `Batch.rows`."""
    assert batch.position_ids is not None
    begins = (batch.position_ids == 0) & (batch.attention_mask == 1)
    return [int(first) - 100 for first in batch.input_ids[begins]]


def test_rows_lie_end_to_end_and_positions_begin_anew() -> None:
    rows = [
        EncodedRow([7, 8, 9, END], 2, False),
        EncodedRow([5, 6, 4, END], 0, False, ((1, 2),)),
        EncodedRow([3, END], 1, False),
    ]
    batch = collate_packed([rows[:2], rows[2:]], PAD)
    assert batch.input_ids.tolist() == [[7, 8, 9, END, 5, 6, 4, END], [3, END] + [PAD] * 6]
    assert batch.attention_mask.tolist() == [[1] * 8, [1, 1] + [0] * 6]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1] + [0] * 6]
    # Nothing in its row predicts the 5, and the gap has no loss.
    assert batch.labels.tolist() == [
        [-100, -100, 9, END, -100, -100, 4, END],
        [-100, END] + [-100] * 6,
    ]
    assert (batch.rows, batch.tokens, collate(rows, PAD).rows) == (3, 10, 3)
    assert batch.targets.tolist() == collate(rows, PAD).targets.tolist() == [9, END, 4, END, END]


def an_epoch(lengths: list[int], seed: int, **layout: int) -> list[Batch]:
    batches = training_batches([row(*one) for one in enumerate(lengths)], 3, PAD, seed, **layout)
    return taken(batches, len(lengths))


def taken(batches: object, count: int) -> list[Batch]:
    found: list[Batch] = []
    while sum(batch.rows for batch in found) < count:
        found.append(next(batches))  # type: ignore[call-overload]
    return found


@settings(deadline=None)
@given(some_lengths, capacities, st.booleans(), st.integers(0, 2**63 - 1))
def test_every_row_comes_once_per_epoch_in_few_full_sequences(
    lengths: list[int], capacity: int, padding_free: bool, seed: int
) -> None:
    batches = training_batches(
        [row(*one) for one in enumerate(lengths)],
        3,
        PAD,
        seed,
        packed_length=capacity,
        padding_free=padding_free,
    )
    for _ in range(2):
        epoch = taken(batches, len(lengths))
        assert sorted(number for batch in epoch for number in row_numbers(batch)) == list(range(len(lengths)))
        widest = max(capacity, *lengths)
        if padding_free:
            assert all(bool(batch.attention_mask.all()) and len(batch.input_ids) == 1 for batch in epoch)
            assert all(batch.tokens <= 3 * widest for batch in epoch)
        else:
            assert all(batch.input_ids.shape[1] <= widest and len(batch.input_ids) <= 3 for batch in epoch)
            sequences = sum(len(batch.input_ids) for batch in epoch)
            assert sequences == len(best_fit_decreasing(lengths, capacity))


@settings(deadline=None)
@given(some_lengths, st.integers(0, 200), st.integers(0, 2**63 - 1))
def test_without_padding_the_batches_have_the_same_rows(lengths: list[int], tokens: int, seed: int) -> None:
    plain = an_epoch(lengths, seed, tokens_per_step=tokens)
    free = an_epoch(lengths, seed, tokens_per_step=tokens, padding_free=True)
    for one, other in zip(plain, free, strict=True):
        assert other.input_ids.flatten().tolist() == one.input_ids[one.attention_mask.bool()].tolist()


@settings(deadline=None)
@given(some_lengths, st.integers(1, 400), st.integers(0, 2**63 - 1))
def test_a_token_budget_holds_as_many_sequences_as_fit(lengths: list[int], tokens: int, seed: int) -> None:
    epoch = an_epoch(lengths, seed, tokens_per_step=tokens, packed_length=60)
    assert all(batch.input_ids.numel() <= tokens or len(batch.input_ids) == 1 for batch in epoch)


def test_packed_batches_follow_the_seed_and_differ_from_epoch_to_epoch() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(2, 14) for _ in range(60)]

    def rows(seed: int, epochs: int = 1) -> list[list[int]]:
        batches = training_batches([row(*one) for one in enumerate(lengths)], 3, PAD, seed, packed_length=20)
        return [row_numbers(batch) for batch in taken(batches, epochs * len(lengths))]

    first = rows(1)
    assert rows(1) == first != rows(2)
    assert rows(1, epochs=2)[: len(first)] == first != rows(1, epochs=2)[len(first) :]


def test_sequences_of_long_and_of_short_rows_meet_in_a_batch() -> None:
    """Packing makes those of the longest rows first: without a draw no batch would have both."""
    epoch = an_epoch([30] * 64 + [10] * 192, 1, packed_length=30)
    of_both = [batch.rows not in (len(batch.input_ids), 3 * len(batch.input_ids)) for batch in epoch]
    assert sum(of_both) > 0.5 * len(epoch)


def test_short_rows_fill_their_sequences() -> None:
    draw = random.Random(0)
    epoch = an_epoch([draw.randint(20, 200) for _ in range(1000)], 1, packed_length=512)
    tokens = sum(batch.tokens for batch in epoch)
    assert tokens > 0.99 * 512 * sum(len(batch.input_ids) for batch in epoch)


@pytest.mark.parametrize("layout", [{"packed_length": 40}, {"padding_free": True}])
def test_a_batch_in_one_of_few_sizes_has_the_same_rows_and_more_padding(layout: dict[str, int]) -> None:
    batch = an_epoch([11, 9, 17, 5, 22, 30, 3], 2, **layout)[0]
    wide = batch.rounded()
    assert (wide.rows, wide.tokens) == (batch.rows, batch.tokens)
    assert row_numbers(wide) == row_numbers(batch)
    assert wide.input_ids.shape[1] % 8 == 0
    assert wide.position_ids is not None and not wide.position_ids[:, batch.input_ids.shape[1] :].any()
