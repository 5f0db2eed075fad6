"""JSON text that any reader takes, and numbers that are not finite through it and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedflame.json_text import put_back, to_text
from fedflame.reading import parse_object

WORDS = (math.nan, math.inf, -math.inf)


def refuse(word: str) -> None:
    raise AssertionError(word)


def standard(text: str) -> Any:
    """What a reader that knows no NaN makes of it."""
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"loss": 1.5}, {"loss": 1.5}),
        ({"loss": math.nan}, {"loss": None, "not_finite": {"/loss": "NaN"}}),
        ({"a": [1.0, -math.inf]}, {"a": [1.0, None], "not_finite": {"/a/1": "-Infinity"}}),
        ({"a": {"b/c~": (math.inf,)}}, {"a": {"b/c~": [None]}, "not_finite": {"/a/b~1c~0/0": "Infinity"}}),
        ({"k": {4: math.nan}}, {"k": {"4": None}, "not_finite": {"/k/4": "NaN"}}),
    ],
)
def test_a_number_that_is_not_finite_is_null_and_a_word(
    value: dict[str, Any], written: dict[str, Any]
) -> None:
    assert standard(to_text(value)) == written
    assert repr(put_back(written)) == repr(json.loads(json.dumps(value)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | st.text("a/~\U0001f600\n"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("a/~0"), inner, max_size=4),
)


@given(st.dictionaries(st.text("ab/~1"), VALUES, max_size=4))
def test_whatever_is_written_is_json_and_comes_back(value: dict[str, Any]) -> None:
    text = to_text(value)
    standard(text)
    assert repr(parse_object(text.encode())) == repr(value)


@pytest.mark.parametrize(
    "words",
    [
        {"/loss": "1.5"}, {"/loss": "word"}, {"/other": "NaN"}, {"/a/9": "NaN"}, {"/a/x": "NaN"},
        {"/a/0": "NaN"}, {"/loss/deep": "NaN"}, {"": "NaN"}, {"/loss": 3}, {"/loss": None},
        [], "NaN", 7, None,
    ],
)  # fmt: skip
def test_what_names_no_number_is_refused(words: Any) -> None:
    with pytest.raises(ValueError, match="its not_finite names no number of it"):
        put_back({"loss": None, "a": [1], "not_finite": words})
