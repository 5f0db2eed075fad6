from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tests.tiny_runs import invoke
from torch import Tensor

from fedflame.bench import measurement
from fedflame.bench.block import Geometry, frozen_model, random_rows
from fedflame.bench.methods import METHODS, Pass
from fedflame.errors import UserError

HIDDEN, WIDTH, EXPERTS, R = 64, 40, 6, 8
TINY = ("--hidden-size", HIDDEN, "--intermediate-size", WIDTH, "--num-experts", EXPERTS, "--r", R)
GEOMETRY = Geometry(HIDDEN, WIDTH, EXPERTS, R, "float32", "cpu")


def bench(*options: object) -> Any:
    return invoke("bench", *map(str, (*TINY, *options)))


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    result = bench("--tokens", "48,32", "--active-experts", "3,1", "--repeats", 2, "--json")
    assert result.exit_code == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def value(measured: dict[str, Any], tokens: int, k: int, method: str) -> dict[str, Any]:
    wanted = (tokens, k, method)
    (found,) = [
        row
        for row in measured["measurements"]
        if (row["tokens"], row["active_experts"], row["method"]) == wanted
    ]
    assert isinstance(found, dict)
    return found


def prepared(name: str, tokens: int, k: int) -> Pass:
    method = METHODS[name]
    return method.prepare(method.build(frozen_model(GEOMETRY), GEOMETRY), GEOMETRY, tokens, k)


@pytest.mark.slow
def test_json_has_every_method_at_every_size(measured: dict[str, Any]) -> None:
    rows = measured["measurements"]
    cells = [(row["tokens"], row["active_experts"], row["method"]) for row in rows]
    assert cells == [(n, k, name) for n in (48, 32) for k in (3, 1) for name in METHODS]
    for row in rows:
        assert len(row["all_seconds"]) == 2
        assert all(math.isfinite(seconds) and seconds > 0 for seconds in row["all_seconds"])
        assert row["seconds"] == pytest.approx(sum(row["all_seconds"]) / 2)
    assert measured["environment"]["threads"] == 1
    assert measured["geometry"]["hidden_size"] == HIDDEN


def test_ours_saves_less_than_composed_and_that_less_than_peft(measured: dict[str, Any]) -> None:
    for tokens in (48, 32):
        saved = {name: value(measured, tokens, 3, name)["saved_bytes"] for name in METHODS}
        assert 0 == saved["gemm"] < saved["ours"] < saved["composed"] < saved["peft"]
        pre_activation = tokens * 3 * 2 * WIDTH * 2  # k = 3, gate and up, bfloat16
        assert saved["ours"] - saved["ours-checkpointed"] == pre_activation


def test_saved_bytes_are_those_of_what_is_kept_by_hand() -> None:
    """A product keeps its right factor, an exponential its result; parameter and input do not count."""
    x = torch.ones(3, 5, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(5, 7))
    one = Pass(lambda: (x @ weight).exp(), torch.ones(3, 7), {"x": x}, [weight])
    assert measurement.saved_bytes(one) == 3 * 7 * 4


def test_the_peak_counts_what_lives_at_one_time() -> None:
    def run() -> Tensor:
        first = torch.empty(1000)
        del first
        return torch.empty(500) + torch.empty(500)

    assert measurement.peak_bytes(run, "cpu") == 3 * 500 * 4


def test_frozen_and_gemm_have_a_gradient_for_their_input_only() -> None:
    assert [list(prepared(name, 16, 2).leaves) for name in ("frozen", "gemm")] == [["x"], ["x"]]


def test_the_floor_multiplies_each_row_by_its_experts_weights() -> None:
    tokens, k = 16, 2
    model = METHODS["gemm"].build(frozen_model(GEOMETRY), GEOMETRY)
    one = METHODS["gemm"].prepare(model, GEOMETRY, tokens, k)
    output, block = one.run(), model.model.layers[0].mlp
    experts = block.gate(random_rows(GEOMETRY, tokens, HIDDEN, seed=0))[2].flatten().sort().values
    activation, d_inner = (
        random_rows(GEOMETRY, tokens * k, width, seed) for width, seed in ((WIDTH, 2), (2 * WIDTH, 3))
    )
    down, gate_up = block.experts.down_proj[experts], block.experts.gate_up_proj[experts]
    torch.testing.assert_close(output, (down @ activation.unsqueeze(2)).squeeze(2))
    torch.testing.assert_close(one.leaves["x"].grad, (gate_up.mT @ d_inner.unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize("k", [1, 3])
def test_ours_and_composed_agree_and_a_wrong_gradient_is_refused(k: int) -> None:
    ours, composed = (prepared(name, 24, k) for name in ("ours", "composed"))
    assert {name.rpartition(".")[2] for name in ours.leaves} == {"x", "A1", "B1", "A2", "B2"}
    measurement.require_equal(ours, composed)
    doubled = Pass(composed.forward, 2 * composed.d_output, composed.leaves, composed.parameters)
    with pytest.raises(UserError, match="ours and composed disagree: gradient of x by "):
        measurement.require_equal(ours, doubled)


def test_the_table_shows_what_ours_takes_of_each() -> None:
    result = bench("--tokens", 16, "--active-experts", 2, "--repeats", 1, "--methods", "ours,gemm")
    assert result.exit_code == 0, result.stderr
    assert "1.000 of it" in result.stdout
    assert "gemm: the base's four products on sorted rows" in result.stdout


def test_the_number_of_threads_is_as_before() -> None:
    before = torch.get_num_threads()
    with measurement.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--active-experts", "7,1"), "--active-experts 7: must be between 1 and 6 (--num-experts)"),
        (
            ("--tokens", "0"),
            "--tokens '0': must be integers of at least 1, such as [8, 4, 2, 1] or \"8,4,2,1\"",
        ),
        (
            ("--methods", "ours,unsloth"),
            "--methods 'unsloth': must be of ours, ours-checkpointed, frozen, gemm, composed, peft",
        ),
        (("--dtype", "int8"), "--dtype int8: must be one of bfloat16, float32"),
        (("--device", "tpu"), "--device tpu: must be cpu"),
        (
            ("--r", "12"),
            "--r 12: grouped_mm needs rows of a multiple of 16 bytes, in bfloat16 a multiple of 8",
        ),
        (
            ("--hidden-size", "70", "--dtype", "float32"),
            "--hidden-size 70: grouped_mm needs rows of a multiple of 16 bytes, in float32 a multiple of 4",
        ),
    ],
)
def test_what_a_user_can_get_wrong(options: tuple[str, ...], line: str) -> None:
    result = bench(*options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"fedflame: {line}")
    assert result.stderr.count("\n") == 1
