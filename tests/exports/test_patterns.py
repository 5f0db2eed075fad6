"""Patterns of adapters: PEFT's meaning where they are supported, refused elsewhere, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from fedflame.exports.patterns import LONGEST, MOST_OPEN, first_match, parse_patterns

NAMES = st.lists(st.text("abx_1", max_size=3), max_size=4).map(".".join)
KEYS = st.builds(
    lambda start, parts: start + "".join(parts),
    st.sampled_from(["", "^"]),
    st.lists(st.sampled_from(["a", "b", "x_1", ".", r"\.", ".*", "1"]), min_size=1, max_size=5),
)


@given(st.lists(KEYS, max_size=3), NAMES)
def test_the_first_match_is_pefts(keys: list[str], name: str) -> None:
    assert (first_match(parse_patterns(keys), name) or name) == get_pattern_key(keys, name)


@pytest.mark.parametrize(
    "key",
    [
        "", "^", "(a+)+$", "a|b", "a+", "a*", "[ab]", r"\d", r"a\b", "a?", "a{9}", "a$", "b^", "ä", "a b",
        "\n", "\\", "a" * (LONGEST + 1),
    ],
)  # fmt: skip
def test_other_regular_expressions_are_refused_in_one_line(key: str) -> None:
    with pytest.raises(ValueError, match=r"^pattern [^\n]*is supported, with \.\* for any letters[^\n]*$"):
        parse_patterns(["q_proj", key])


def test_the_longest_and_the_most_are_allowed_and_no_more() -> None:
    assert first_match(parse_patterns(["a" * LONGEST]), "a" * LONGEST)
    many = [f".*{number}" for number in range(MOST_OPEN + 1)]
    parse_patterns([*many[:-1], "q_proj"])
    with pytest.raises(ValueError, match=f"at most {MOST_OPEN} patterns"):
        parse_patterns(many)


def test_no_pattern_and_no_name_takes_long() -> None:
    worst = (".*a" * LONGEST)[: LONGEST - 1] + "b"
    start = time.process_time()
    assert first_match(parse_patterns([worst]), "a." * 2000) == ""
    assert time.process_time() - start < 5
    assert re.escape(worst)
