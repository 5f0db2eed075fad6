"""Runs whose updates are seen in sums alone: the same result, what is said, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.open_draws import draw_openly
from tests.tiny_models import TOP_K
from tests.tiny_runs import (
    ONE_ROUND,
    adapter_bytes,
    arguments,
    events,
    invoke,
    state_bytes,
    tiny_config,
    tiny_run,
)

from fedflame.config.load import load_config
from fedflame.config.sum_options import require_groups
from fedflame.errors import UserError
from fedflame.experiment.plan import plan_run
from fedflame.experiment.prepare import prepare
from fedflame.server.checkpoint import read_checkpoint

SIX = (
    "clients.num_clients=6",
    "clients.active_experts=4,4,4,2,2,2",
    "data.max_rows=96",
    "training.local_lr_scheduler_type=linear",
)
MASKED = (*SIX, "privacy.secure_aggregation=true", "server.num_server_rounds=2")
PLAIN = (*SIX, "strategy.clip=none", "strategy.k_rotation=none", "server.num_server_rounds=1")


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("masked") / "run"
    result = invoke(*arguments(tiny_folder, run, *MASKED))
    assert result.exit_code == 0, result.stderr
    assert "round 1: client 0 (k=4) is in a masked sum" in result.stdout
    return run


@pytest.mark.slow
def test_a_round_of_sums_ends_where_one_of_updates_does(
    finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """But for the rounding of sums: 2^-25, where the rates of the tiny model move values by about 0.001."""
    tiny_run(tiny_folder, tmp_path / "run", *PLAIN)
    plain, found = read_checkpoint(tmp_path / "run", 1).state, read_checkpoint(finished, 1).state
    for name, value in plain.adapter.tensors().items():
        assert (value - found.adapter.tensors()[name]).abs().max() < 1e-4, name
    for k in (4, 2):
        assert (plain.rescalers[k] - found.rescalers[k]).abs().max() < 1e-6
    known = ("active_experts", "rank", "learning_rate", "steps", "num_examples", "trained_examples")
    lines, of_sums = (
        [[line[name] for name in known] for line in events(run, "client")]
        for run in (tmp_path / "run", finished)
    )
    assert lines == of_sums[: len(lines)] != []


@pytest.mark.slow
def test_workers_change_no_byte(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    longer = invoke(*arguments(tiny_folder, tmp_path / "workers", *MASKED), "--workers", "2")
    assert longer.exit_code == 0, longer.stderr
    assert state_bytes(tmp_path / "workers") == state_bytes(finished)
    assert adapter_bytes(tmp_path / "workers") == adapter_bytes(finished)


def test_a_run_that_goes_on_ends_in_the_same_bytes(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    again = invoke(*arguments(tiny_folder, run, *MASKED), "--resume-from", "1")
    assert again.exit_code == 0, again.stderr
    assert state_bytes(run) == state_bytes(finished) and adapter_bytes(run) == adapter_bytes(finished)


def test_the_log_and_the_page_hold_no_loss_and_no_count(finished: Path) -> None:
    updates = events(finished, "client")
    assert len(updates) == 12
    assert all(one["loss"] is None and one["counts"] == [] and not one["norms"] for one in updates)
    assert all(one["bytes_up"] > one["bytes_down"] / 2 for one in updates)
    page = (finished / "report.html").read_text()
    assert "seen in sums only" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [("strategy.name=fedavg",), ("strategy.name=ffa_lora",), ("strategy.name=rolora",)]
)
def test_plain_means_sum_too_and_with_private_rows(
    more: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    private = ("privacy.unit=row", "privacy.noise_multiplier=1.5")
    tiny_run(tiny_folder, tmp_path / "run", *MASKED, *more, *private)
    assert len(events(tmp_path / "run", "privacy")) == 12 and len(events(tmp_path / "run", "client")) == 12


@pytest.mark.slow
def test_private_rows_and_sums_together_equal_private_rows_alone(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With draws that do not follow from the plan, since the two plans differ."""
    draw_openly(monkeypatch)
    private = ("privacy.unit=row", "privacy.noise_multiplier=1.5", ONE_ROUND)
    tiny_run(tiny_folder, tmp_path / "alone", *PLAIN, *private)
    tiny_run(tiny_folder, tmp_path / "both", *MASKED, *private)
    one, other = (read_checkpoint(tmp_path / name, 1).state.adapter.tensors() for name in ("alone", "both"))
    for name, value in one.items():
        assert (value - other[name]).abs().max() < 1e-6, name
    assert events(tmp_path / "alone", "privacy") == events(tmp_path / "both", "privacy") != []


@pytest.mark.slow
def test_clients_of_unequal_rows_go_over_their_own_once_and_are_in_one_sum(
    tiny_folder: Path, tmp_path: Path
) -> None:
    epoch = ("training.num_train_epochs=1", ONE_ROUND, "privacy.min_group=3")
    tiny_run(tiny_folder, tmp_path / "run", *MASKED, *epoch)
    found = events(tmp_path / "run", "client")
    assert len(found) == 6 and all(one["trained_examples"] == one["num_examples"] for one in found)
    assert len({one["num_examples"] for one in found}) > 1 < len({one["steps"] for one in found})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("strategy.name=hetlora", "no weighted mean"),
        ("strategy.name=flora", "no weighted mean"),
        ("strategy.clip=median", "strategy.clip = 'median'"),
        ("strategy.robust=median", "strategy.robust = 'median'"),
        ("server.fraction_evaluate=0.5", "server.fraction_evaluate = 0.5"),
    ],
)
def test_what_needs_single_updates_is_refused_by_name(setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(None, ["privacy.secure_aggregation=true", setting])


TOO_FEW = r"clients that train with k = 4: 1; .*privacy\.min_group = 3\."


def test_a_group_that_can_never_be_summed_is_refused_before_anything_is_loaded(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_folder, tmp_path / "run", "privacy.secure_aggregation=true")
    with pytest.raises(UserError, match=TOO_FEW):
        prepare(config)
    with pytest.raises(UserError, match=TOO_FEW):
        plan_run(config)
    few = tiny_config(tiny_folder, tmp_path / "run", *MASKED, "server.fraction_train=0.34")
    with pytest.raises(UserError, match=r"fraction_train = 0\.34 samples 2 clients .*min_group = 3\."):
        prepare(few)
    require_groups(tiny_config(tiny_folder, tmp_path / "run", *MASKED), TOP_K)
    require_groups(tiny_config(tiny_folder, tmp_path / "run"), TOP_K)


def test_a_small_group_is_left_out_of_a_round(tiny_folder: Path, tmp_path: Path) -> None:
    tiny_run(tiny_folder, tmp_path / "run", *MASKED, "server.fraction_train=0.84")
    left_out = events(tmp_path / "run", "excluded")
    assert {one["reason"].split("with")[0] for one in left_out} == {"2 clients "} and len(left_out) == 4
    assert all("are ready; privacy.min_group = 3" in one["reason"] for one in left_out)
    assert len(events(tmp_path / "run", "client")) == 6
