"""systemd starts a trainer again whenever it ends: the unit says so, and its command stands being killed."""

from __future__ import annotations

import configparser
import shlex
import signal
import sys
from pathlib import Path

import pytest
from tests.cli_process import CliProcess
from tests.tiny_runs import invoke

from fedflame.trainer.ask import ask
from fedflame.trainer.site import load_site
from fedflame.wire.envelope import Envelope


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder of a site over Flower, as `fedflame site init` makes it."""
    pytest.importorskip("flwr")
    (tmp_path / "ca.crt").write_text("x")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 3)
    options = {
        "--superlink": "localhost:9",
        "--root-certificates": tmp_path / "ca.crt",
        "--name": "north",
        "--data": tmp_path / "rows.jsonl",
        "--active-experts": 4,
        "--allow-model": "olmoe-tiny",
    }
    flat = [str(part) for option in options.items() for part in option]
    told = invoke("site", "init", tmp_path / "north", *flat)
    assert told.exit_code == 0, told.output
    return tmp_path / "north"


def service_of(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    return parser["Service"]


@pytest.mark.slow
def test_a_trainer_that_is_killed_is_started_again_and_answers(site: Path) -> None:
    service = service_of(site / "fedflame-trainer.service")
    assert (service["Restart"], service["RestartSec"], service["KillMode"]) == (
        "always",
        "5",
        "control-group",
    )
    command = shlex.split(service["ExecStart"])
    assert command == [sys.executable, "-m", "fedflame", "trainer", "--site", str(site / "site.toml")]
    request = Envelope({"kind": "describe", "ticket": "", "run": "0" * 32, "site": "north"})
    for end, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
        process = CliProcess(command[3:])
        answer = ask(load_site(site / "site.toml").socket_path, request, patience=60, timeout=60)
        assert (answer.header["kind"], answer.header["num_examples"]) == ("description", 3)
        process.send_signal(end)
        assert process.wait(30) == code
