"""The names of trackers: those that are known and installed, each once, or one line before the run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import tiny_config

from fedflame.config.load import load_config
from fedflame.errors import UserError
from fedflame.experiment.prepare import prepare
from fedflame.trackers.process import require_installed

pytestmark = pytest.mark.slow


def test_an_unknown_tracker_and_one_that_is_not_installed_are_one_line_before_the_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = "Input should be 'tensorboard', 'wandb', 'mlflow' or 'trackio'"
    with pytest.raises(UserError, match=f"^config: report_to.0 = 'wand': {known}$"):
        load_config(None, ["report_to=wand"])
    run = tmp_path / "run"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        prepare(tiny_config(tiny_folder, run, "report_to=wandb"))
    line = "report_to: wandb is not installed; pip install 'fedflame[wandb]'"
    assert str(refused.value) == line and not run.exists()


def test_a_folder_of_a_trackers_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as wandb leaves one in the working folder
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    for loaded in [name for name in sys.modules if re.match(r"wandb\b", name)]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(UserError, match="wandb is not installed"):
        require_installed(["wandb"])


@pytest.mark.parametrize("given", ["none", "", "[]", []])
def test_none_is_no_tracker(given: Any) -> None:
    assert load_config({"report_to": given}).report_to == ()


def test_each_tracker_is_one_however_often_it_is_named() -> None:
    assert load_config({"report_to": ["wandb", "trackio", "wandb"]}).report_to == ("wandb", "trackio")


@pytest.mark.parametrize("given", [[["wandb"]], [{"wandb": 1}], 5, True, {"wandb": {}}])
def test_what_names_no_tracker_is_one_line(given: Any) -> None:
    with pytest.raises(UserError, match=r"^config: (unknown key 'report_to|report_to)[^\n]*$"):
        load_config({"report_to": given})
