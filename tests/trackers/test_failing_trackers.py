"""Trackers that fail, hang or outlive the run, strange packages under their names: a line, and no wait."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.trackers.kept_curves import needs, trackio_curves

from fedflame.config.load import load_config
from fedflame.trackers import process
from fedflame.trackers.process import reporting, require_installed

pytestmark = pytest.mark.slow

STRANGE = {
    "tensorboard": "raise ImportError('a library is missing\\nand a second line')",
    "wandb": "import time; time.sleep(600)",
    "mlflow": "import os; print('x' * 1_000_000); os._exit(3)",
    "trackio": "def init(**settings): raise ConnectionError('no network')",
}


def test_trackers_that_fail_hang_or_die_cost_one_line_each(
    undisturbed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in STRANGE.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(process, "END_SECONDS", 0.5)
    lines, trackers = list[str](), load_config(None, [f"report_to={','.join(STRANGE)}"]).report_to
    require_installed(trackers)
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    with reporting(trackers, run, "the-name", lines.append) as look:
        deadline = time.monotonic() + 60
        while len(lines) < 3 and time.monotonic() < deadline:
            look()
            time.sleep(0.05)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert sorted(lines) == [
        "warning: mlflow is off: its process ended with code 3",
        "warning: tensorboard is off: ImportError: a library is missing and a second line",
        "warning: trackio is off: ConnectionError: no network",
        "warning: wandb is off: it did not end within 0.5 s",
    ]


SLOW = """
import sys, time
class Run:
    def log(self, metrics, step):
        time.sleep(600 * (sys.argv[1] == "log"))
    def finish(self):
        time.sleep(600 * (sys.argv[1] == "finish"))
def init(**settings):
    time.sleep(600 * (sys.argv[1] == "init"))
    return Run()
"""
WITHIN_A_SECOND = """
import sys
from pathlib import Path
from fedflame.trackers import follow
follow.ANSWER_SECONDS = 1
sys.exit(follow.follow("trackio", Path(sys.argv[2]), "the-name"))
"""


@pytest.mark.parametrize("slow", ["init", "log", "finish", "nothing"])
def test_a_tracker_that_does_not_answer_is_ended_by_the_clock(
    slow: str, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "trackio.py").write_text(SLOW)
    run = shutil.copytree(undisturbed(), tmp_path / "run")
    places = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", WITHIN_A_SECOND, slow, str(run)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": places},
    ) as ended:
        assert ended.wait(50) == (0 if slow == "nothing" else -signal.SIGALRM)
        if slow != "nothing":
            assert process._reason(ended) == "it did not answer within 60 s"


def test_a_ctrl_c_at_the_terminal_does_not_reach_a_tracker(tmp_path: Path) -> None:
    with process._start("trackio", tmp_path, "the-name") as child:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
        child.kill()


KILLED = """
import os, sys, time
from pathlib import Path
from fedflame.trackers.process import reporting
with reporting(["trackio"], Path(sys.argv[1]), "the-name", print):
    os.kill(os.getpid(), 9)
"""


@pytest.mark.usefixtures("offline")
def test_of_a_run_that_was_killed_the_tracker_still_gets_what_is_kept_and_ends(
    undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    needs("trackio")
    run = tmp_path / "run"
    shutil.copytree(undisturbed(), run)
    subprocess.run([sys.executable, "-c", KILLED, str(run)], timeout=60, stdout=subprocess.DEVNULL)
    lines = list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "END_SECONDS", 120.0)
        with reporting(["trackio"], run, "the-name", lines.append):  # waits for the one before
            pass
    assert [step for step, _ in trackio_curves(run)["eval/loss/k1"]] == [0, 2, 4, 6]
    assert lines == []
