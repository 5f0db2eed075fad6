"""Over Flower itself, on loopback with TLS and node keys: the same bytes, and who is turned away.

The federation is that of examples/loopback_flower.py, set up once for all tests here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.engines.conftest import let_sites_know_each_other
from tests.same_runs import assert_same, assert_same_but_for_rounded_sums
from tests.tiny_runs import events, invoke

from fedflame.engines.flower.job import Assignment, write_job
from fedflame.engines.flower.key import make_key
from fedflame.engines.hub import load_hub
from fedflame.errors import USER_ERROR
from loopback import Loopback, descendants, fedflame, free_port
from loopback_flower import BIN, QUIET, flwr, loopback_flower, register, start_node

pytest.importorskip("flwr")
pytestmark = [
    pytest.mark.federation,
    pytest.mark.usefixtures("forked_commands"),
    pytest.mark.timeout(300, func_only=True),
]
APP = Path(__file__).parents[2] / "examples" / "flower"


@pytest.fixture(scope="module")
def federation(
    forked_commands: None, experiment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loopback]:
    with loopback_flower(tmp_path_factory.mktemp("federation"), experiment) as found:
        yield found


def apps_below(federation: Loopback) -> Iterator[tuple[str, bool]]:
    """Flower's processes of apps that run now, and whether each has loaded torch."""
    for name, service in federation.services.items():
        if not name.endswith("trainer"):
            for pid in descendants(service.process.pid):
                place = Path(f"/proc/{pid}")
                try:
                    command, maps = (place / "cmdline").read_bytes(), (place / "maps").read_text()
                except OSError:
                    continue
                for app in ("flwr-serverapp", "flwr-clientapp"):
                    if app.encode() in command:
                        yield app, "libtorch" in maps


def test_three_nodes_with_keys_give_the_bytes_of_one_process_and_carry_without_torch(
    federation: Loopback, experiment: Path, finished: Path, tmp_path: Path
) -> None:
    seen = set[tuple[str, bool]]()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(federation.run, experiment, tmp_path / "run")
        while not running.done():
            seen |= set(apps_below(federation))
            time.sleep(0.3)
    done = running.result()
    assert done.returncode == 0, done.stdout
    assert_same(tmp_path / "run", finished)
    told = events(tmp_path / "run", "client_evaluation")
    assert [(event["round"], event["client"]) for event in told] == [(n, c) for n in (0, 2) for c in range(3)]
    assert all(event["bytes_up"] < 1000 for event in told)
    assert seen == {("flwr-serverapp", False), ("flwr-clientapp", False)}


def start_app(federation: Loopback, experiment: Path, run: Path) -> str:
    """`flwr run` of examples/flower; the id of the run."""
    given = {"experiment": experiment, "hub": federation.hub_file, "output-dir": run}
    text = " ".join(f'{name}="{value}"' for name, value in given.items())
    home = federation.hub_file.parent
    done = flwr(home, "run", str(APP), "hub", "--run-config", text, "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    return str(json.loads(done.stdout)["run-id"])


def state_of(federation: Loopback, run: str) -> dict[str, Any]:
    home = federation.hub_file.parent
    done = flwr(home, "list", "hub", "--run-id", run, "--format", "json")
    found: dict[str, Any] = json.loads(done.stdout)["runs"][0]
    return found


def test_flwr_run_of_masked_sums_is_right_although_a_trainer_is_killed_in_the_round(
    federation: Loopback, masked: Path, unmasked: Path, tmp_path: Path
) -> None:
    let_sites_know_each_other(federation)
    trainer = federation.services["site-2 trainer"]
    log = federation.folder / "site-2" / "trainer.log"
    before = log.read_text().count("round 1: training")
    run = start_app(federation, masked, tmp_path / "run")
    deadline = time.monotonic() + 200
    while log.read_text().count("round 1: training") == before:
        assert time.monotonic() < deadline, state_of(federation, run)
        time.sleep(0.01)
    trainer.process.send_signal(signal.SIGKILL)
    while not (tmp_path / "run" / "report.html").exists():  # looking at it takes less than asking Flower
        assert time.monotonic() < deadline, state_of(federation, run)
        time.sleep(0.1)
    while not (state := state_of(federation, run))["status"].startswith("finished"):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert state["status"] == "finished:completed", state
    assert log.read_text().count("round 1: training") == before + 2, "the killed one began the round again"
    assert_same_but_for_rounded_sums(tmp_path / "run", unmasked)


# Who is turned away


def refused_node(federation: Loopback, folder: Path) -> str:
    """What a node says that is started with the key in this folder, and ends."""
    superlink = load_hub(federation.hub_file).flower.address
    authority = str(federation.hub_file.parent / "ca.crt")
    asked = [str(BIN / "flower-supernode"), "--superlink", superlink, "--root-certificates", authority,
             "--auth-supernode-private-key", str(folder / "node"), "--port", free_port()]  # fmt: skip
    log = folder / "log"
    with log.open("wb") as out:  # no pipe: a child of the node may live on for some seconds
        node = subprocess.Popen(
            asked, env=os.environ | QUIET | {"FLWR_HOME": str(folder)}, stdout=out, stderr=out
        )
        try:
            assert node.wait(120) != 0
        finally:
            node.kill()
    return log.read_text()


REFUSED = "Failed to activate SuperNode"
"""Which a node whose key is registered is not told."""


def test_a_node_whose_key_is_not_registered_is_refused(federation: Loopback, tmp_path: Path) -> None:
    make_key(tmp_path / "node")
    assert REFUSED in refused_node(federation, tmp_path)


def test_a_site_that_was_revoked_is_refused(federation: Loopback, tmp_path: Path) -> None:
    """A guest beside the sites of the other tests, who stay."""
    node = register(federation.hub_file.parent, make_key(tmp_path / "node"))
    text = federation.hub_file.read_text().replace('"ca.crt"', f'"{federation.hub_file.parent}/ca.crt"')
    hub = tmp_path / "hub.toml"
    hub.write_text(text.replace('sites = "', 'sites = "guest,') + f'guest = "{node}"\n')
    told = fedflame("hub", "revoke", hub, "guest")
    assert told.returncode == 0 and "guest is revoked" in told.stdout, told.stdout
    assert REFUSED in refused_node(federation, tmp_path)
    assert fedflame("hub", "check", federation.hub_file).returncode == 0
    again = fedflame("hub", "revoke", hub, "guest")
    assert again.returncode == USER_ERROR and "guest is not revoked: flwr supernode: " in again.stdout


def test_a_node_with_the_key_of_another_site_does_not_become_this_one(federation: Loopback) -> None:
    """Site-1's own node is away, so that nothing but the key is against it."""
    for site in ("site-1", "site-2"):
        federation.services.pop(f"{site} engine").stop()
    start_node(federation, "site-1", federation.folder / "site-2" / "node")
    deadline = time.monotonic() + 150
    try:
        while True:
            check = fedflame("hub", "check", federation.hub_file)
            if "ok   site site-2 is connected" in check.stdout:
                break
            assert time.monotonic() < deadline, check.stdout
        assert "BAD  site site-1 is not connected" in check.stdout
        assert check.returncode == 1
    finally:
        federation.services.pop("site-1 engine").stop()


# What a user can do wrong


def test_a_hub_file_without_a_section_of_flower_is_one_line(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text('sites = "a,b,c"\n')
    told = invoke("run", experiment, "--engine", "flower", "--hub", tmp_path / "hub.toml")
    assert told.exit_code == USER_ERROR
    assert told.stderr.startswith("fedflame: hub file: flower.address = '': must be host and port")
    assert told.stderr.count("\n") == 1


def test_a_superlink_that_is_not_there_is_one_line(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "hub.toml").write_text(f'sites = "a,b,c"\n[flower]\naddress = "127.0.0.1:{free_port()}"\n')
    told = invoke("run", experiment, "--engine", "flower", "--hub", tmp_path / "hub.toml")
    assert told.exit_code == USER_ERROR
    assert "no SuperLink there: [Errno 111] Connection refused" in told.stderr
    assert told.stderr.count("\n") == 1


def test_without_flwr_one_line_says_how_to_install_it(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.command.sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hub.toml").write_text('sites = "a,b,c"\n')
    told = invoke("run", experiment, "--engine", "flower", "--hub", tmp_path / "hub.toml")
    assert told.exit_code == USER_ERROR
    assert told.stderr == "fedflame: flwr is not installed; pip install 'fedflame[flower]'\n"


def test_what_a_run_needs_to_know_survives_the_run_config(tmp_path: Path) -> None:
    given = Assignment(Path("/tmp/a b/hub.sock"), "segment", 4200.0, ["a", "b"], {"a": 2**64 - 1, "b": 7})
    app, run_config = write_job(tmp_path, given)
    values = tomllib.loads(run_config.read_text())
    assert Assignment.from_run_config(values) == given
    project = tomllib.loads((app / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == [] and list(app.iterdir()) == [app / "pyproject.toml"]
    assert project["tool"]["flwr"]["app"]["config"].keys() == values.keys()
