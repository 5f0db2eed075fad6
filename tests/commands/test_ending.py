"""Commands that are told to end, as processes of their own."""

from __future__ import annotations

import ast
import fcntl
import os
import pty
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.cli_process import wait_until_gone
from tests.tiny_runs import arguments, wait_for_lines

import fedflame
from fedflame.run_files.checkpoints import kept_rounds
from loopback import descendants

pytestmark = pytest.mark.slow

COMMAND = """
import signal, sys, time
from pathlib import Path
from fedflame.cli.ending import ends_when_told
left = Path(sys.argv[1])
try:
    with ends_when_told():
        try:
            left.write_text("begun")
            time.sleep(60)
        finally:
            left.write_text("cleans up")
            while not left.with_name("enough").exists():
                time.sleep(0.01)
            print("the last words", flush=True)
            left.write_text("clean")
except BaseException as error:
    names = ("SIGTERM", "SIGHUP")
    ignored = [name for name in names if signal.getsignal(signal.Signals[name]) == signal.SIG_IGN]
    left.with_name("ignored").write_text(" ".join(ignored))
    sys.exit(error.exit_code)
"""
"""A command that cleans up until a file is there, beside the one that says how far it is."""


def start(left: Path, **streams: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(left)], text=True, **streams)  # type: ignore[call-overload, no-any-return]


def wait_until(left: Path, what: str) -> None:
    deadline = time.monotonic() + 60
    while not left.exists() or left.read_text() != what:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_further_signals_leave_a_command_to_clean_up(end: signal.Signals, tmp_path: Path) -> None:
    left = tmp_path / "left"
    process = start(left, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_until(left, "begun")
    process.send_signal(end)
    wait_until(left, "cleans up")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.05)
    (tmp_path / "enough").touch()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, left.read_text()) == (128 + end, "clean")
    ignored = (tmp_path / "ignored").read_text()
    assert ignored == "SIGTERM SIGHUP", "Python takes all other handlers away while it ends"
    what = "interrupted" if end == signal.SIGINT else f"ended by {end.name}"
    assert errors == f"fedflame: it is ending; another Ctrl-C ends it at once, as it is\nfedflame: {what}\n"


def test_a_third_ctrl_c_ends_a_command_that_does_not_end(tmp_path: Path) -> None:
    left = tmp_path / "left"
    process = start(left, stderr=subprocess.PIPE)
    wait_until(left, "begun")
    process.send_signal(signal.SIGINT)
    wait_until(left, "cleans up")
    process.send_signal(signal.SIGINT)
    assert process.stderr and "another Ctrl-C" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_what_was_ignored_when_a_command_began_stays_ignored(tmp_path: Path) -> None:
    """As SIGHUP is under nohup."""
    left = tmp_path / "left"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(left, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(left, "begun")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None and left.read_text() == "begun"
    (tmp_path / "enough").touch()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "fedflame: ended by SIGTERM\n"


def test_a_command_whose_terminal_goes_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "enough").touch()
    left, (ours, theirs) = tmp_path / "left", pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(left)], preexec_fn=own_terminal, **streams)
    os.close(theirs)
    wait_until(left, "begun")
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert left.read_text() == "clean"


def test_a_command_that_ends_by_itself_leaves_the_handlers_as_they_were() -> None:
    from fedflame.cli.ending import SIGNALS, ends_when_told

    before = [signal.getsignal(number) for number in SIGNALS]
    with ends_when_told():
        assert all(signal.getsignal(number) not in before for number in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.timeout(120)
def test_a_signal_to_all_processes_of_a_run_leaves_none_of_them_and_nothing_temporary(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """As systemd, a terminal and a batch system send it. Workers leave it to the main process to end them."""
    run, temporary = tmp_path / "run", Path(tempfile.mkdtemp())  # short: a socket lies in it
    words = [*arguments(tiny_folder, run), "--workers", "3", "--set", "training.max_steps=500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedflame", *words],
        env=environment(TMPDIR=str(temporary)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_lines(process, run, 10)
    children = descendants(process.pid)
    assert len(children) >= 3, "the fork server and two other workers"
    assert list(temporary.iterdir())
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.05)
    errors = process.communicate(timeout=60)[1]
    go_on = f"the same command with --resume goes on after round {max(kept_rounds(run), default=0)}"
    assert (process.returncode, errors) == (143, f"fedflame: ended by SIGTERM; {go_on}\n")
    temporary.rmdir()  # it is empty
    assert (run / "report.html").exists() and not (run / ".lock").exists()
    wait_until_gone(children)


def environment(**more: str) -> Mapping[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def test_every_command_ends_like_this() -> None:
    folder = Path(fedflame.__file__).parent / "cli"
    commands = [
        node
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("command(" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert len(commands) > 10
    for command in commands:
        assert "with user_errors(debug):" in ast.unparse(command), command.name
