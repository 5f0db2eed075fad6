"""Long series in few numbers: the means of equal spans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflame.run_files.spans import in_spans


@given(st.lists(st.floats(-10, 10), max_size=450))
def test_many_values_become_means_of_equal_spans_in_order(values: list[float]) -> None:
    found = in_spans(values, 100)
    assert len(found) == min(len(values), 100)
    if len(values) <= 100:
        assert found == values
        return
    sizes = [len(values) * (at + 1) // 100 - len(values) * at // 100 for at in range(100)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(size * mean for size, mean in zip(sizes, found, strict=True)) == pytest.approx(
        sum(values), abs=1e-6
    )
    assert all(min(values) - 1e-9 <= mean <= max(values) + 1e-9 for mean in found)
