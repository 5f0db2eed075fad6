"""An export where there is something already: replaced whole and only if asked, whatever fails on the way."""

import json
import resource
from pathlib import Path

import pytest
from tests.tiny_exports import K, R, run_config

from fedflame.errors import UserError
from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import export_adapter, merge_checkpoint, read_settings
from fedflame.exports.new_folder import RUN_FILE, new_folder
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState


def test_an_earlier_export_is_replaced_only_when_asked(
    base: Path, adapted: AdaptedModel, state: ServerState, exported: Path
) -> None:
    (exported / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="holds an earlier export; --overwrite replaces it"):
        export_adapter(state, trained_run(run_config(base), 5), adapted.model, exported)
    assert (exported / "mine.txt").read_text() == "kept"
    export_adapter(state, trained_run(run_config(base), 5), adapted.model, exported, overwrite=True)
    assert not (exported / "mine.txt").exists()
    assert json.loads((exported / "fedflame.json").read_text())["rounds"] == 5
    assert list(exported.parent.iterdir()) == [exported]


def test_a_folder_of_something_else_is_never_replaced(
    base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="not empty and no earlier export"):
        export_adapter(state, trained_run(run_config(base), 1), adapted.model, home, overwrite=True)
    with pytest.raises(UserError, match="not empty and no earlier export"):
        merge_checkpoint(state, trained_run(run_config(base), 1), K, home, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        export_adapter(
            state, trained_run(run_config(base), 1), adapted.model, tmp_path / "file", overwrite=True
        )
    assert (home / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    export_adapter(state, trained_run(run_config(base), 1), adapted.model, tmp_path / "empty")
    assert read_settings(tmp_path / "empty").adapter.r == R


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_a_full_disk_leaves_the_old_export_and_nothing_half_written(
    what: str, base: Path, adapted: AdaptedModel, state: ServerState, exported: Path
) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(UserError, match=r"cannot write: .*nothing was changed"):
            if what == "adapter":
                export_adapter(
                    state, trained_run(run_config(base), 5), adapted.model, exported, overwrite=True
                )
            else:
                merge_checkpoint(state, trained_run(run_config(base), 5), K, exported, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(exported.parent.iterdir()) == [exported]
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


@pytest.mark.parametrize(("moved", "left"), [(False, "the earlier one"), (True, "the new one")])
def test_an_export_that_is_ended_while_it_replaces_another_leaves_one_of_them(
    moved: bool, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "out", Path.rename
    target.mkdir()
    (target / RUN_FILE).write_text("the earlier one")

    def interrupted(path: Path, to: Path) -> Path:
        if path.name == "new":
            if moved:
                rename(path, to)
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(target, overwrite=True) as folder:
        (folder / RUN_FILE).write_text("the new one")
    assert (target / RUN_FILE).read_text() == left
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
