"""Files with a checksum of themselves: whole, or one line with what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.refusals import refusal_of

from fedflame.checked_json import read_checked, write_checked
from fedflame.errors import UserError

VALUE = {"seed": 3, "names": ["a", "é"], "loss": math.inf, "by_k": {4: 1.25e-7}, "none": None}


def refusal(path: Path) -> str:
    line = refusal_of(read_checked, path, "do this")
    assert line.startswith(f"{path}: ") and line.endswith("; do this")
    return line.removeprefix(f"{path}: ").removesuffix("; do this")


def test_it_comes_back_and_is_json_for_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_checked(path, VALUE)
    assert read_checked(path, "") == VALUE | {"by_k": {"4": 1.25e-7}}
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["loss"] is None


def test_laid_out_anew_it_is_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_checked(path, VALUE)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(values.items())), indent=7))
    assert read_checked(path, "")["seed"] == 3


def test_what_is_missing_edited_or_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert refusal(path) == "No such file or directory"
    write_checked(path, VALUE)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"seed": 4}))
    assert refusal(path) == "its checksum is wrong: damaged or edited"
    del values["checksum"]
    path.write_text(json.dumps(values))
    assert refusal(path) == "has no checksum: damaged, edited, or made by an earlier fedflame"
    path.write_text("[]")
    assert refusal(path) == "holds a list; it must hold a JSON object"


def test_every_flipped_bit_and_every_cut_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_checked(path, VALUE)
    whole, value = path.read_bytes(), read_checked(path, "")
    damaged = [whole[:length] for length in range(len(whole))]
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    harmless = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert read_checked(path, "") == value
            harmless += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert harmless < 0.05 * len(damaged), "only the layout may change"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.floats() | st.text("a\n")))
def test_whatever_is_written_is_read(tmp_path: Path, value: dict[str, Any]) -> None:
    value.pop("checksum", None)
    value.pop("not_finite", None)
    write_checked(tmp_path / "x", value)
    assert repr(sorted(read_checked(tmp_path / "x", "").items())) == repr(sorted(value.items()))
