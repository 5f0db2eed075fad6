"""What an update may weigh: rows and counts that are claimed, as far as they are believed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.message_samples import valid_update

from fedflame.server.validation import believed, most_rows


@pytest.mark.parametrize(
    ("claims", "most"),
    [
        ([], 0),
        ([0, 0], 0),
        ([5], 50),
        ([3, 2**40], 30),
        ([2**40, 3, 0, 4], 40),
        ([100, 300, 200, 1], 1000),
    ],
)
def test_a_client_weighs_by_ten_times_the_median_of_the_claims_at_most(claims: list[int], most: int) -> None:
    assert most_rows(claims) == most


@pytest.mark.parametrize(("rows", "weight"), [(39, 39), (40, 40), (41, 40), (0, 9)])
def test_rows_are_believed_up_to_the_most_or_to_those_trained_on(rows: int, weight: int) -> None:
    update = valid_update()
    assert believed(update, rows).num_examples == weight
    assert torch.equal(believed(update, rows).counts, update.counts), "two of five experts at k = 2"


def test_a_count_is_believed_up_to_eight_times_the_even_one() -> None:
    """Of 64 experts at k = 1 each would see 10 of 640 tokens, and of 6 tokens fewer than one."""
    counts = torch.zeros(1, 64, dtype=torch.int64)
    counts[0, :4] = torch.tensor([479, 81, 80, 0])
    update = replace(valid_update(), counts=counts, tokens=640, active_experts=1)
    assert believed(update, 40).counts[0, :4].tolist() == [80, 80, 80, 0]
    few = replace(update, counts=(counts > 0).long(), tokens=6)
    assert believed(few, 40).counts[0, :4].tolist() == [1, 1, 1, 0]
