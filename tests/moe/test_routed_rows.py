from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedflame.moe.routed_rows import RoutedRows
from fedflame.moe.row_passes import sum_per_token

EXPERTS = 6


def test_sorted_rows_are_grouped_by_expert_in_their_old_order() -> None:
    flat = [3, 0, 3, 5, 0, 2, 3, 0]
    rows = RoutedRows.sort(torch.tensor(flat).view(4, 2), EXPERTS)
    expected = sorted(range(len(flat)), key=lambda row: (flat[row], row))
    assert rows.order.tolist() == expected
    assert rows.tokens.tolist() == [row // 2 for row in expected]
    assert rows.positions.flatten().tolist() == [expected.index(row) for row in range(len(flat))]
    counts = [flat.count(expert) for expert in range(EXPERTS)]
    assert rows.per_expert.tolist() == counts
    assert rows.offsets.tolist() == [sum(counts[: expert + 1]) for expert in range(EXPERTS)]
    assert rows.offsets.dtype == torch.int32


@st.composite
def choices(draw: st.DrawFn) -> torch.Tensor:
    """Routing choices [N,k]."""
    k = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, EXPERTS - 1), min_size=k, max_size=k)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=12)))


@given(choices(), st.integers(1, 40), st.integers(1, EXPERTS))
def test_blocks_are_the_rows_of_consecutive_experts_in_order(
    index: torch.Tensor, size: int, together: int
) -> None:
    rows = RoutedRows.sort(index, EXPERTS)
    blocks = rows.blocks(size, together)
    assert len(blocks) >= EXPERTS / together
    experts = [e for block in blocks for e in list(range(EXPERTS))[block.experts]]
    assert experts == list(range(EXPERTS))
    of_row = index.flatten()[rows.order].tolist()
    seen = []
    for block in blocks:
        names, start = list(range(EXPERTS))[block.experts], 0
        for expert, end in zip(names, block.offsets.tolist(), strict=True):
            assert of_row[block.rows][start:end] == [expert] * (end - start)
            start = end
        assert start == len(of_row[block.rows])
        seen += of_row[block.rows]
        counts = [of_row.count(expert) for expert in names]
        others = counts[:-1]
        assert len(names) <= together
        assert sum(others) < size, "a block ends with the expert that fills it"
    assert seen == of_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(index=choices())
def test_the_sum_per_token_is_the_plain_sum_to_the_last_bit(dtype: torch.dtype, index: torch.Tensor) -> None:
    rows = RoutedRows.sort(index, EXPERTS)
    values = torch.randn(index.numel(), 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = []
    for token, chosen in enumerate(index.tolist()):
        own = [int(rows.positions[token, slot]) for slot in range(len(chosen))]
        assert [int(rows.tokens[row]) for row in own] == [token] * len(chosen)
        expected.append(torch.stack([values[row] for row in own]).sum(0))
    assert torch.equal(sum_per_token(values, rows.positions), torch.stack(expected))


def test_one_block_holds_all_rows() -> None:
    rows = RoutedRows.sort(torch.tensor([[3, 0], [3, 5]]), EXPERTS)
    block = rows.one_block()
    assert rows.tokens[block.rows].tolist() == rows.tokens.tolist()
    assert list(range(EXPERTS))[block.experts] == list(range(EXPERTS))
    assert block.offsets.tolist() == [1, 1, 1, 3, 3, 4]
