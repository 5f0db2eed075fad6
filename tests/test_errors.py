"""Foreign text as one line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflame.errors import LONGEST_LINE, InvalidMessage, one_line

any_text = st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf"]))


@given(any_text)
def test_whatever_the_text_is_it_can_be_printed_and_stored_and_is_no_longer_than_allowed(text: str) -> None:
    line = one_line(text)
    assert line.isprintable() and len(line) <= LONGEST_LINE
    assert (line.encode() and line == one_line(line)) or not line
    assert str(InvalidMessage(text)) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("k = 8 is too much", "k = 8 is too much"),
        ("Größe — 日本", "Größe — 日本"),
        ("two\nlines\tand  spaces ", "two lines and spaces"),
        ("\x1b[31mred\x1b[0m \x9b2J", "[31mred [0m 2J"),
        ("a\ud800b\udfffc", "a b c"),
        ("\u202eevil\u2066 \ufeff", "evil"),
        ("x" * LONGEST_LINE, "x" * LONGEST_LINE),
        ("x" * (LONGEST_LINE + 1), "x" * (LONGEST_LINE - 3) + "..."),
        ("\x00" * 10**6, ""),
    ],
)
def test_what_can_be_printed_stays(text: str, line: str) -> None:
    assert one_line(text) == line
