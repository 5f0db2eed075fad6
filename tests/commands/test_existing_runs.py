"""A run folder that is there: neither lost nor mixed up, whether it is resumed, replaced or damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny_runs import (
    ONE_ROUND,
    adapter_bytes,
    arguments,
    checkpoint_bytes,
    events,
    invoke,
    tiny_config,
    tiny_run,
)

from fedflame.checked_json import write_checked
from fedflame.config.run_config import SCHEMA_VERSION
from fedflame.errors import UserError
from fedflame.run_files.checkpoints import checkpoint_path
from fedflame.server.checkpoint import read_checkpoint


def test_an_existing_run_is_neither_touched_nor_forgotten(finished: Path, tiny_folder: Path) -> None:
    before = checkpoint_bytes(finished)
    result = invoke(*arguments(tiny_folder, finished))
    assert result.exit_code == 2
    assert result.stderr == (
        f"fedflame: {finished}: exists already; --resume goes on with it, --overwrite starts anew\n"
    )
    assert checkpoint_bytes(finished) == before


def test_overwrite_starts_anew(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND, existing="overwrite")
    assert read_checkpoint(tmp_path / "run").round == 1
    assert len(events(tmp_path / "run", "round")) == 1


def test_overwrite_keeps_the_old_run_if_the_new_one_cannot_start(
    undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed(ONE_ROUND), tmp_path / "run")
    before = checkpoint_bytes(tmp_path / "run")
    with pytest.raises(UserError, match="num_clients"):
        tiny_run(tiny_folder, tmp_path / "run", "clients.num_clients=400", existing="overwrite")
    assert checkpoint_bytes(tmp_path / "run") == before


def test_overwrite_removes_no_folder_that_is_not_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        tiny_run(tiny_folder, tmp_path / "thesis", existing="overwrite")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_run_of_another_version_is_left_with_the_key_that_is_not_known(
    tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.json"
    values = json.loads(tiny_config(tiny_folder, tmp_path / "run").model_dump_json())
    values["strategy"]["k_rotation"] = "odd"
    write_checked(path, {"schema_version": SCHEMA_VERSION} | values)
    with pytest.raises(UserError) as error:
        tiny_run(tiny_folder, tmp_path / "run", existing="resume")
    assert str(error.value) == (
        f"{path}, which is left as it is: strategy.k_rotation = 'odd': "
        "Input should be 'auto', 'none', 'smaller' or 'all'"
    )
    assert "odd" in path.read_text()


def test_resume_refuses_another_configuration_and_names_the_key(finished: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"training\.learning_rate differs"):
        tiny_run(tiny_folder, finished, "training.learning_rate=0.5", existing="resume")


def test_resume_refuses_other_data(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"instruction": f"say {n}", "response": str(n)}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = f"data.dataset_name={tmp_path / 'rows.jsonl'}"
    tiny_run(tiny_folder, tmp_path / "run", data)
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:-1], rows[-1].replace("say", "tell")]))
    with pytest.raises(UserError, match="--resume needs the data it was started with"):
        tiny_run(tiny_folder, tmp_path / "run", data, existing="resume")


def test_a_run_folder_may_be_moved_and_resumed(
    undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed(ONE_ROUND), tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    tiny_run(tiny_folder, tmp_path / "moved", ONE_ROUND, existing="resume")
    assert read_checkpoint(tmp_path / "moved").round == 1


def test_resume_without_a_run_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder"):
        tiny_run(tiny_folder, tmp_path / "nothing", existing="resume")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_checkpoint_is_refused_and_left_alone(
    kept: int, undisturbed: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed(ONE_ROUND), tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", 1)
    path.write_bytes(path.read_bytes()[:kept])
    damaged, metrics = path.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"truncated or damaged|that are no fedflame checkpoint") as error:
        tiny_run(tiny_folder, tmp_path / "run", ONE_ROUND, existing="resume")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == damaged
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.slow
def test_a_full_disk_while_checkpointing_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, finished: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def full_in_round_2(descriptor: int) -> None:
        started = (run / "metrics.jsonl").exists() and len(events(run, "round")) == 2
        if started and ".partial" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_in_round_2)
        with pytest.raises(UserError, match=r"cannot write .* bytes: No space left on device"):
            tiny_run(tiny_folder, run)
    assert read_checkpoint(run).round == 1
    assert not list(run.rglob("*.partial"))
    tiny_run(tiny_folder, run, existing="resume")
    assert adapter_bytes(run) == adapter_bytes(finished)
