"""Trackers beside a run: the real packages where they are installed, and strange ones under their names."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import adapter_bytes, events, tiny_config

from fedflame.checked_json import read_checked, write_checked
from fedflame.config.load import load_config
from fedflame.errors import UserError
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run import run_experiment
from fedflame.run_files.checkpoints import checkpoint_path
from fedflame.trackers import process
from fedflame.trackers.process import reporting, require_installed
from fedflame.trackers.sinks import TensorBoard, TrackedRun

pytestmark = pytest.mark.slow

Curves = dict[str, list[tuple[int, float]]]
"""Name -> step and value, in the order in which they are kept, duplicates too."""
STEPS = 2
"""Of a round: round n is step 2 n."""


def tensorboard_curves(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def trackio_curves(run: Path) -> Curves:
    from trackio.sqlite_storage import SQLiteStorage

    names = SQLiteStorage.get_runs("fedflame")
    assert [name.rpartition("-")[0] for name in names] == ["the-name"]
    curves: Curves = defaultdict(list)
    for line in SQLiteStorage.get_logs("fedflame", names[0]):
        for name, value in line.items():
            if name not in ("step", "timestamp"):
                curves[name].append((line["step"], value))
    return curves


def mlflow_curves(run: Path) -> Curves:
    from mlflow.tracking import MlflowClient

    store = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = store.get_experiment_by_name("fedflame")
    (found,) = store.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("the-name", "FINISHED")
    assert found.data.params["adapter.r"] == "3"
    names = found.data.metrics.keys() - {"round"}
    history = {name: store.get_metric_history(found.info.run_id, name) for name in names}
    return {name: [(one.step, one.value) for one in metrics] for name, metrics in history.items()}


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format after a header of 7 bytes."""
    at, block, record = 7, 32_768, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_curves(run: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = defaultdict(list)
    names = set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for content in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            names |= {record.run.run_id} - {""}
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    curves[name].append((items["_step"], value))
    assert len(names) == 1, "one run, however often it was resumed"
    return curves


READERS: dict[str, Callable[[Path], Curves]] = {
    "tensorboard": tensorboard_curves,
    "wandb": wandb_curves,
    "mlflow": mlflow_curves,
    "trackio": trackio_curves,
}


def needs(tracker: str) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed; pip install 'fedflame[{tracker}]'")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tracker keeps what it gets on this machine, in the folder of the test."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time enough to import a tracker where all cores are at work."""
    monkeypatch.setattr(process, "END_SECONDS", 120.0)


def interrupted_in_round_2(config: Any) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "client" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(prepare(config), on_event=stop)


@pytest.mark.usefixtures("offline", "slow_machine")
@pytest.mark.parametrize("tracker", READERS)
def test_a_run_that_was_interrupted_and_resumed_is_one_run_with_each_round_once(
    tracker: str,
    tiny_folder: Path,
    tmp_path: Path,
    undisturbed: Callable[..., Path],
) -> None:
    needs(tracker)
    run = tmp_path / "run"
    config = tiny_config(tiny_folder, run, f"report_to={tracker}", "run_name=the-name")
    interrupted_in_round_2(config)
    again = tiny_config(tiny_folder, run, f"report_to={tracker}", "run_name=a-later-name")
    run_experiment(prepare(again, "resume"))
    curves = READERS[tracker](run)
    for k in (4, 2, 1):
        told = [
            (event["round"] * STEPS, pytest.approx(event["loss"], rel=1e-6))
            for event in events(run, "evaluation")
            if event["active_experts"] == k and event["category"] is None
        ]
        assert curves[f"eval/loss/k{k}"] == told and len(told) == 4
    assert [step for step, _ in curves["train/learning_rate"]] == [2, 4, 6]
    losses = [
        ((event["round"] - 1) * STEPS + at, pytest.approx(loss, rel=1e-6))
        for event in events(run, "client")
        if event["client"] == 0
        for at, loss in enumerate(event["step_losses"], 1)
    ]
    k = {event["active_experts"] for event in events(run, "client") if event["client"] == 0}
    of_client_0 = sorted(point for one in k for point in curves[f"train/step_loss/k{one}"])
    assert len(losses) == 6 and {step for step, _ in of_client_0} == {1, 2, 3, 4, 5, 6}
    assert all(any(point == wanted for point in of_client_0) for wanted in losses[:2])
    rates = [5e-3, 3.75e-3, 1.25e-3]  # the default of 5e-3, by a cosine: the shares 1, 3/4 and 1/4
    assert [value for _, value in curves["train/learning_rate"]] == pytest.approx(rates, rel=1e-6)
    assert all(len({number for number, _ in points}) == len(points) for points in curves.values())
    assert adapter_bytes(run) == adapter_bytes(undisturbed())


@pytest.mark.usefixtures("offline", "slow_machine")
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_that_is_named_later_gets_the_rounds_before_too_and_going_back_gives_no_round_twice(
    tracker: str, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    needs(tracker)
    run, lines = tmp_path / "run", list[str]()
    shutil.copytree(undisturbed(), run)
    for _ in range(2):
        with reporting([tracker], run, "the-name", lines.append):  # type: ignore[list-item]
            pass
    checkpoint_path(run, 3).rename(run / "aside")  # as after --resume-from 2
    with reporting([tracker], run, "the-name", lines.append):  # type: ignore[list-item]
        (run / "aside").rename(checkpoint_path(run, 3))
    curves = READERS[tracker](run)
    assert [step // STEPS for step, _ in curves["eval/loss/k2"]] == [0, 1, 2, 3]
    assert lines == []


@pytest.mark.usefixtures("offline", "slow_machine")
@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_round_that_was_sent_but_not_noted_before_a_kill_is_there_once(
    tracker: str, undisturbed: Callable[..., Path], tmp_path: Path
) -> None:
    needs(tracker)
    run, lines = tmp_path / "run", list[str]()
    shutil.copytree(undisturbed(), run)
    state = run / "trackers" / f"{tracker}.json"
    for _ in range(2):
        with reporting([tracker], run, "the-name", lines.append):  # type: ignore[list-item]
            pass
        write_checked(state, read_checked(state, "") | {"round": 1})
    curves = READERS[tracker](run)
    assert [step // STEPS for step, _ in curves["eval/loss/k2"]] == [0, 1, 2, 3]
    assert lines == []


def test_a_run_that_is_resumed_within_a_second_by_a_process_of_any_number_is_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads files in the order of their names, and names have the second and the process."""
    needs("tensorboard")
    for first_round, number in ((1, 9_999), (2, 10_000)):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        sink = TensorBoard(TrackedRun(tmp_path, "the-name", {}, "", first_round, STEPS))
        sink.log({first_round * STEPS: {"loss": float(first_round)}})
        sink.close(finished=True)
    assert tensorboard_curves(tmp_path) == {"loss": [(2, 1.0), (4, 2.0)]}


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
