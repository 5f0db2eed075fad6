"""What old jobs leave, and what of it stays; without a server."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedflame.engines.hub import Hub, NvflareHub
from fedflame.engines.nvflare.engine import NvflareEngine
from fedflame.engines.nvflare.job_folders import KEPT, prune_kit, superfluous_folders, superfluous_jobs

DAY = 86400.0
NOW = 1_000 * DAY


def job_id(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-0123456789ab"


def listed(number: int, **changes: str) -> dict[str, str]:
    """As `nvflare job list` has it."""
    known = {"job_id": job_id(number), "job_name": "fedflame", "status": "FINISHED:COMPLETED"}
    return known | {"submit_time": f"2026-11-{number:02}T04:55:05+00:00"} | changes


def test_the_oldest_jobs_of_ours_that_are_over_may_go() -> None:
    jobs = [listed(number) for number in range(14, 0, -1)]
    assert superfluous_jobs(jobs) == [job_id(number) for number in (1, 2, 3, 4)]
    assert superfluous_jobs(jobs[:KEPT]) == []
    jobs[-1] = listed(1, status="RUNNING")
    jobs[-2] = listed(2, job_name="another")
    assert superfluous_jobs(jobs) == [job_id(number) for number in (3, 4, 5)]


def leave(kit: Path, number: int, days_ago: float, name: str = "fedflame") -> Path:
    folder = kit / job_id(number)
    (folder / "app").mkdir(parents=True)
    for file, content in (("meta.json", json.dumps({"name": name})), ("log.txt", "said")):
        (folder / file).write_text(content)
        os.utime(folder / file, (NOW - days_ago * DAY,) * 2)
    os.utime(folder / "app", (NOW - days_ago * DAY,) * 2)
    return folder


def test_the_last_folders_in_a_kit_stay_and_those_of_the_last_day(tmp_path: Path) -> None:
    folders = [leave(tmp_path, number, days_ago=number) for number in range(1, 14)]
    leave(tmp_path, 90, 500, name="another")
    (tmp_path / job_id(91)).mkdir()
    for name in ("startup", "local"):
        (tmp_path / name).mkdir()
    assert superfluous_folders(tmp_path, NOW) == folders[KEPT:]
    os.utime(folders[-1] / "log.txt", (NOW - 100,) * 2)
    assert superfluous_folders(tmp_path, NOW) == folders[KEPT - 1 : -1], "it may still run"
    assert superfluous_folders(tmp_path, NOW - 13 * DAY) == [], "all that is younger than a day stays"


def test_a_job_that_begins_at_a_site_prunes_its_kit(tmp_path: Path) -> None:
    pytest.importorskip("nvflare")
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContext

    from fedflame.engines.nvflare.executor import FedflameExecutor

    folders = [leave(tmp_path, number, days_ago=number) for number in range(1, 13)]
    context = FLContext()
    workspace = SimpleNamespace(get_root_dir=lambda: str(tmp_path))
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=False)
    FedflameExecutor().handle_event(EventType.END_RUN, context)
    assert all(folder.exists() for folder in folders)
    FedflameExecutor().handle_event(EventType.START_RUN, context)
    assert [folder.exists() for folder in folders] == [True] * KEPT + [False] * 2


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    prune_kit(tmp_path)
    (tmp_path / job_id(1)).mkdir()
    prune_kit(tmp_path)
    assert (tmp_path / job_id(1)).exists()


@pytest.mark.parametrize("deletes", [True, False])
def test_a_job_that_is_submitted_deletes_old_ones_at_the_hub(
    deletes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether nvflare does it or not, the job is submitted."""
    asked, done = list[list[str]](), threading.Event()

    def nvflare(command: list[str], cwd: Path, **_: Any) -> SimpleNamespace:
        assert cwd == tmp_path, "in the kit, not in a folder with files without end, all of which it reads"
        words = command[1 : command.index("--startup-kit")]
        asked.append(words)
        data: Any = {"server_start_time": 1.0, "job_id": "new"}
        if words == ["job", "list"]:
            data = [listed(number) for number in range(1, 13)]
        if words[:2] == ["job", "delete"] and (not deletes or len(asked) == 5):
            done.set()
        status = "ok" if deletes or words[:2] != ["job", "delete"] else "error"
        return SimpleNamespace(stdout=json.dumps({"status": status, "data": data}), stderr="")

    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_admin.json").write_text("{}")
    monkeypatch.setattr("fedflame.engines.nvflare.engine.nvflare_command", lambda: "nvflare")
    monkeypatch.setattr(subprocess, "run", nvflare)
    engine = NvflareEngine(Hub(sites=("a",), folder=tmp_path, nvflare=NvflareHub(admin_kit=".")))
    assert engine.submit(tmp_path / "socket", "key") == "new"
    assert done.wait(20)
    gone = [["job", "delete", job_id(number), "--force"] for number in (1, 2)]
    assert [words for words in asked if words[1] == "delete"] == (gone if deletes else gone[:1])
