"""A run folder says its schema version: one of another version is told apart, and may only be replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.folder_contents import contents
from tests.tiny_runs import ONE_ROUND, checkpoint_bytes, invoke, tiny_run

from fedflame.checked_json import read_checked, write_checked
from fedflame.config.run_config import SCHEMA_VERSION
from fedflame.errors import UserError
from fedflame.experiment.run_folder import saved_config


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "without a checksum"])
@pytest.mark.parametrize("version", [None, SCHEMA_VERSION + 1, "1"])
def test_a_run_folder_of_another_version_is_refused_and_may_be_replaced(
    version: int | str | None,
    checked: bool,
    undisturbed: Callable[..., Path],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed(ONE_ROUND), run)
    path = run / "config.json"
    values = read_checked(path, "")
    assert values.pop("schema_version") == SCHEMA_VERSION
    values |= {} if version is None else {"schema_version": version}
    if checked:
        write_checked(path, values)
    else:
        path.write_text(json.dumps(values))
    before = contents(run)
    line = (
        f"{run}: its settings have schema version {version!r}; this fedflame reads version {SCHEMA_VERSION}. "
        "Use the fedflame that made it, or start a new run"
    )
    with pytest.raises(UserError) as refused:
        tiny_run(tiny_folder, run, ONE_ROUND, existing="resume")
    assert str(refused.value) == line
    for command in (("evaluate", run), ("export", run, "--to", tmp_path / "out")):
        result = invoke(*command)
        assert (result.exit_code, result.stderr) == (2, f"fedflame: {line}\n")
    with pytest.raises(UserError, match="exists already"):
        tiny_run(tiny_folder, run, ONE_ROUND)
    assert contents(run) == before
    tiny_run(tiny_folder, run, ONE_ROUND, "seed=5", existing="overwrite")
    assert saved_config(run).seed == 5 and checkpoint_bytes(run)


@pytest.mark.parametrize(
    "content", ["[1, 2]", "{}", '{"schema_version": 1}', '{"schema_version": 7}', "null", "not JSON"]
)
def test_a_folder_with_another_config_json_is_no_run_and_stays(
    content: str, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(content)
    with pytest.raises(UserError, match="left as it is"):
        tiny_run(tiny_folder, tmp_path / "mine", existing="overwrite")
    assert (tmp_path / "mine" / "config.json").read_text() == content
