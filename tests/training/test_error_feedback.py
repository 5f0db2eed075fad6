"""Error feedback: nothing that rounding took is lost, and asked again a client answers again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.message_samples import SHAPE, a_plan, an_update
from torch import Tensor

from fedflame.errors import UserError
from fedflame.messages import Adapter, ClientUpdate, RoundPlan, half_of
from fedflame.training.error_feedback import Residuals, encode_with_feedback
from fedflame.wire.codec import decode_update, encode_update

LOSSY = pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
EVERYWHERE = torch.ones(SHAPE[:2], dtype=torch.int64)


def plan_of(round_number: int, dtype: Any, feedback: bool = True) -> RoundPlan:
    return replace(a_plan(), round=round_number, update_dtype=dtype, error_feedback=feedback)


def update_of(round_number: int, counts: Tensor | None = None, trainable: Any = "both") -> ClientUpdate:
    """Another delta in every round; of a frozen half it is zero."""
    update = an_update(seed=100 + round_number, counts=counts)
    values = {
        name: value if trainable in ("both", half_of(name)) else torch.zeros_like(value)
        for name, value in update.delta.tensors().items()
    }
    return replace(update, round=round_number, delta=Adapter.from_tensors(values), trainable=trainable)


def send(update: ClientUpdate, residuals: Residuals, dtype: Any) -> Adapter:
    plan = plan_of(update.round, dtype)
    return decode_update(encode_with_feedback(update, plan, residuals), plan).delta


def add(sums: dict[str, Tensor], adapter: Adapter) -> None:
    for name, value in adapter.tensors().items():
        sums[name] = sums.get(name, 0) + value.double()


@pytest.mark.slow
@LOSSY
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_was_sent_and_what_is_owed_sum_to_what_was_learned(
    dtype: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By plain sums in float64, with experts that are active in some rounds and halves that take turns."""
    residuals = Residuals(tmp_path_factory.mktemp("residuals"))
    learned: dict[str, Tensor] = {}
    sent: dict[str, Tensor] = {}
    halves = data.draw(st.lists(st.sampled_from(["both", "A", "B"]), min_size=1, max_size=5))
    for number, half in enumerate(halves, 1):
        update = update_of(number, trainable=half)
        add(learned, update.delta)
        add(sent, send(update, residuals, dtype))
    owed = residuals.before(7, len(halves) + 1)
    assert owed is not None
    add(sent, owed)
    for name, value in learned.items():
        assert torch.allclose(sent[name], value, rtol=0, atol=1e-5), name


@LOSSY
def test_a_value_too_small_for_one_round_arrives_after_several(dtype: str, tmp_path: Path) -> None:
    """A fifth of a step beside a large value: rounded away every time, or sent as one step in five."""
    step = {"int8": 1 / 127, "bfloat16": 2**-8}[dtype]
    sums = {True: 0.0, False: 0.0}
    for feedback in sums:
        residuals = Residuals(tmp_path / str(feedback))
        for number in range(1, 11):
            update = update_of(number, EVERYWHERE)
            matrix = torch.zeros_like(update.delta.experts["0.A2"])
            matrix[2, 0, 0] = 1.0 if dtype == "int8" else 0.0
            matrix[2, 1, 1] = 0.2 * step + (1.0 if dtype == "bfloat16" else 0.0)
            experts = {**update.delta.experts, "0.A2": matrix}
            update = replace(update, delta=Adapter(experts, update.delta.attention))
            plan = plan_of(number, dtype, feedback)
            got = decode_update(encode_with_feedback(update, plan, residuals), plan).delta.experts["0.A2"]
            sums[feedback] += float(got[2, 1, 1]) - (1.0 if dtype == "bfloat16" else 0.0)
    assert sums[False] == 0.0
    assert abs(sums[True] - 2 * step) <= step


@LOSSY
def test_asked_for_the_last_round_again_a_client_answers_with_the_same_bytes(
    dtype: str, tmp_path: Path
) -> None:
    residuals = Residuals(tmp_path)
    for number in (1, 2, 4):
        first = encode_with_feedback(update_of(number), plan_of(number, dtype), residuals)
        again = encode_with_feedback(update_of(number), plan_of(number, dtype), residuals)
        assert first == again
    assert sorted(path.name for path in (tmp_path / "7").iterdir()) == ["2.sealed", "4.sealed"]


def test_without_feedback_nothing_is_kept_and_nothing_owed_is_read(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path)
    send(update_of(1, EVERYWHERE), residuals, "int8")
    update, plan = update_of(2, EVERYWHERE), plan_of(2, "int8", feedback=False)
    assert encode_with_feedback(update, plan, residuals) == encode_update(update, plan)
    assert encode_with_feedback(update, plan_of(2, "int8"), residuals) != encode_update(update, plan)
    assert not list((tmp_path / "7").glob("3*"))


def test_clients_owe_for_themselves(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path)
    send(update_of(1, EVERYWHERE), residuals, "int8")
    assert residuals.before(7, 2) is not None
    assert residuals.before(6, 2) is None
    assert residuals.before(7, 1) is None


def test_an_update_that_is_not_finite_leaves_what_was_owed(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path)
    send(update_of(1, EVERYWHERE), residuals, "int8")
    before = residuals.before(7, 9)
    broken = update_of(2, EVERYWHERE)
    broken.delta.experts["0.A1"][0, 0, 0] = math.nan
    encode_with_feedback(broken, plan_of(2, "int8"), residuals)
    after = residuals.before(7, 9)
    assert before is not None and after is not None
    assert all(torch.equal(after.tensors()[name], value) for name, value in before.tensors().items())


def test_a_client_that_pruned_its_rank_owes_what_is_left_of_it(tmp_path: Path) -> None:
    residuals, cut = Residuals(tmp_path), 2
    send(update_of(1, EVERYWHERE), residuals, "int8")
    owed = residuals.before(7, 2)
    assert owed is not None
    update = update_of(2, EVERYWHERE)
    update = replace(update, delta=update.delta.with_rank(cut))
    plan = plan_of(2, "int8")
    plan = replace(plan, adapter=plan.adapter.with_rank(cut))
    message = encode_with_feedback(update, plan, residuals)
    wanted = replace(update, delta=update.delta.combine(owed.with_rank(cut), torch.add))
    assert message == encode_update(wanted, plan)


def test_a_damaged_file_is_named_and_the_client_may_go_on_without(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path)
    send(update_of(1, EVERYWHERE), residuals, "int8")
    path = tmp_path / "7" / "1.sealed"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"1\.sealed: cannot be read .* put back a copy of the file$"):
        send(update_of(2), residuals, "int8")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"1\.sealed: cannot be read .*Is a directory"):
        send(update_of(2), residuals, "int8")
    path.rmdir()
    send(update_of(2), residuals, "int8")


def test_what_is_kept_no_longer_and_cannot_be_removed_costs_no_answer(tmp_path: Path) -> None:
    residuals = Residuals(tmp_path)
    (tmp_path / "7" / "0.sealed" / "inside").mkdir(parents=True)
    for number in (1, 2):
        residuals.keep(7, number, update_of(number).delta)
    assert sorted(path.stem for path in (tmp_path / "7").iterdir()) == ["0", "1", "2"]
