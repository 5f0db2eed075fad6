"""Files that are damaged or a stranger's: each is a value or one line, whatever is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedflame.errors import UserError
from fedflame.reading import (
    DEEPEST,
    LONGEST_JSON,
    LONGEST_TOML,
    escaped,
    read_object,
    read_toml,
    require_plain,
    shown,
)

JSON = {
    "": "not JSON: Expecting value: line 1 column 1 (char 0)",
    "[1]": "holds a list; it must hold a JSON object",
    "null": "holds a NoneType; it must hold a JSON object",
    '{"a": NaN}': "not JSON: NaN is no JSON",
    '{"a": -Infinity}': "not JSON: -Infinity is no JSON",
    '{"a": 1': "not JSON: Expecting ',' delimiter: line 1 column 8 (char 7)",
    '{"a": "\\ud800"}': "has text that is no Unicode: '\\ud800'",
    '{"\\udfff": 1}': "has text that is no Unicode: '\\udfff'",
    '{"a": 9223372036854775808}': "has an integer of more than 64 bits",
    '{"a": ' + "[" * 70 + "]" * 70 + "}": f"nested in more than {DEEPEST} levels",
    '{"a": ' + "[" * 100_000: "not JSON: nested too deep",
    '{"a": null, "not_finite": {"/b": "NaN"}}': "its not_finite names no number of it",
}


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_that_cannot_be_used_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_object(path, "model ")
    assert str(refused.value) == f"model {path}: {JSON[text]}"


def test_an_integer_of_thousands_of_digits_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": ' + "7" * 5000 + "}")
    with pytest.raises(UserError, match=r"^[^\n]*not JSON: Exceeds the limit[^\n]*$"):
        read_object(path)
    for text in ("a = " + "7" * 5000, "a = 0x" + "f" * 20_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"^[^\n]*(Exceeds the limit|more than 64 bits)[^\n]*$"):
            read_toml(path)


@pytest.mark.parametrize("read", [read_object, read_toml])
def test_what_is_no_file_is_one_line(read: Any, tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "no", "No such file or directory")):
        with pytest.raises(UserError, match=reason):
            read(path)
    with pytest.raises(UserError, match=r"\0b: no path: embedded null byte$"):
        read(Path("a\0b"))


def test_a_file_that_is_too_large_is_refused_before_it_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large"
    for read, most in ((read_object, LONGEST_JSON), (read_toml, LONGEST_TOML)):
        with path.open("wb") as file:
            file.truncate(10 * most)  # no block of it is on the disk
        with pytest.raises(UserError, match=f"larger than {most:,} bytes"):
            read(path)


def test_what_is_just_allowed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for text in (
        '{"a": 9223372036854775807, "b": -9223372036854775807}',
        '{"\ufb01": "\ud7ff \ue000 \U0001f600"}',
        '{"a": ' + "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1) + "}",
    ):
        path.write_text(text)
        assert read_object(path) == json.loads(text)
    path.write_text('{"a": ' + "[" * DEEPEST + "]" * DEEPEST + "}")
    with pytest.raises(UserError, match=f"nested in more than {DEEPEST} levels"):
        read_object(path)
    path.write_text("a = 1 #".ljust(LONGEST_TOML))
    assert read_toml(path) == {"a": 1}


TOML = {
    "a = ": "not TOML: Invalid value (at end of document)",
    "a = " + "[" * 100_000: "not TOML: nested too deep",
    ".".join("a" * 100) + " = 1": f"not TOML: nested in more than {DEEPEST} levels",
    "a = 9223372036854775808": "not TOML: has an integer of more than 64 bits",
}


@pytest.mark.parametrize("text", TOML, ids=range(len(TOML)))
def test_toml_that_cannot_be_used_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_toml(path)
    assert str(refused.value) == f"config file {path}: {TOML[text]}"


def test_bytes_that_are_no_utf_8_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="not UTF-8 at byte 7"):
        read_object(path)
    with pytest.raises(UserError, match="not TOML: 'utf-8' codec can't decode"):
        read_toml(path)


TEXTS = st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=[])), inner),
).map(lambda value: json.dumps(value).encode())


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS | ANY_JSON)
@example(b"[" * 5000)
@example(b'\xef\xbb\xbf{"a": 1}')
@example(b"a = [{}, 1979-05-27]")
def test_any_bytes_are_a_plain_value_or_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    for read in (read_object, read_toml):
        try:
            value: Any = read(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            require_plain(value)
            json.dumps(value, default=str).encode()


def test_what_is_shown_of_a_value_is_short() -> None:
    assert shown("a") == "'a'"
    assert shown("a" * 1000) == "'" + "a" * 99 + "…"
    assert shown(10**5000) == "an integer of thousands of digits"


def test_reading_keeps_no_file_open(tmp_path: Path) -> None:
    before = os.listdir("/dev/fd")
    (tmp_path / "x").write_text("{}")
    assert read_object(tmp_path / "x") == {}
    assert os.listdir("/dev/fd") == before


def test_escaped_text_is_printable_and_keeps_letters_of_every_script() -> None:
    assert escaped("a\x1b[2J\u202eé日\n") == "a\\x1b[2J\\u202eé日\\n"
