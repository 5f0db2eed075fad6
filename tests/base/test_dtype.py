"""The dtype of the base: the one that is asked for, or one that is clearly faster than those before."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedflame.base.device import DeviceChoice
from fedflame.base.dtype import DTYPES, DtypeChoice, choose_dtype
from fedflame.cost.model_shape import read_model_shape

CPU = DeviceChoice("cpu", "in this test")


def test_a_dtype_that_is_asked_for_is_taken_unprobed(tiny_folder: Path) -> None:
    shape = replace(read_model_shape(tiny_folder), hidden_size=2**20, expert_size=2**20)  # 4 TB to probe
    assert choose_dtype("float16", shape, CPU) == DtypeChoice("float16", "as model.dtype asks")


def test_auto_takes_one_of_the_dtypes_and_says_how_long_each_took(tiny_folder: Path) -> None:
    shape = read_model_shape(tiny_folder)
    assert choose_dtype("auto", shape, CPU) == DtypeChoice(
        "float32", "experts below 256 gain nothing from another dtype"
    )
    choice = choose_dtype("auto", replace(shape, hidden_size=256, expert_size=264), CPU)
    assert choice.name in DTYPES
    assert re.match(r"one expert's products: \d+\.\d ms in float32, ", choice.reason)
    assert all(dtype in choice.reason for dtype in DTYPES)


@pytest.mark.parametrize(
    ("seconds", "expected"),  # of float32, bfloat16 and float16; at full size, twice as long
    [
        ((2.0, 1.0, 1.0), "bfloat16"),
        ((2.0, 1.3, 9.0), "bfloat16"),
        ((2.0, 1.4, 1.4), "float32"),
        ((2.0, 9.0, 9.0), "float32"),
        ((3.0, 2.0, 1.0), "float16"),
        ((3.0, 1.0, 0.7), "bfloat16"),  # no clear gain over bfloat16
        ((3.0, 9.0, 1.0), "float16"),  # bfloat16 emulated, as on a GPU that lacks it
        ((3.0, 2.5, 1.8), "float32"),  # clearly faster than float32 alone
    ],
)
def test_auto_takes_a_dtype_only_where_it_is_clearly_faster_than_those_before(
    seconds: tuple[float, ...], expected: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, timed = 0.0, set()

    def products(hidden_size: int, expert_size: int, dtype: torch.dtype) -> None:
        nonlocal now
        name = str(dtype).removeprefix("torch.")
        now += seconds[DTYPES.index(name)] * hidden_size / 256
        timed.add((name, hidden_size, expert_size))

    monkeypatch.setattr("fedflame.base.dtype._expert_products", products)
    monkeypatch.setattr("fedflame.base.dtype.time.perf_counter", lambda: now)
    shape = replace(read_model_shape(tiny_folder), hidden_size=512, expert_size=256)
    choice = choose_dtype("auto", shape, CPU)
    assert choice.name == expected
    emulated = {name for name, time in zip(DTYPES, seconds, strict=True) if time > 4 * seconds[0]}
    assert timed == {(name, 256, 256) for name in DTYPES} | {
        (name, 512, 256) for name in DTYPES if name not in emulated
    }
    found = [
        f"emulated in {name}" if name in emulated else f"{2e3 * time:.1f} ms in {name}"
        for name, time in zip(DTYPES, seconds, strict=True)
    ]
    assert choice.reason == f"one expert's products: {', '.join(sorted(found, key=lambda f: f[0] == 'e'))}"
