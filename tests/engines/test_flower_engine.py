"""What is asked of Flower's command, and what its answers mean; here the command is a script of ours."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_runs import invoke

from fedflame.engines.flower.engine import FlowerEngine
from fedflame.engines.hub import FlowerHub, Hub, HubRounds
from fedflame.errors import UserError

SCRIPT = """\
#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
config = pathlib.Path(os.environ["FLWR_HOME"], "config.toml").read_text()
note = {{"asked": sys.argv[1:], "config": config, "env": dict(os.environ)}}
if sys.argv[1] == "run":
    note["project"] = sorted(os.listdir(sys.argv[2]))
    note["run config"] = pathlib.Path(sys.argv[5]).read_text()
with (folder / "notes").open("a") as notes:
    notes.write(json.dumps(note) + "\\n")
print((folder / sys.argv[1]).read_text())
sys.exit(0)
"""
ID = "18446744073709551615"


class Flwr:
    """Says what it is told to, and exits with 0 whatever that is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.says("run", {"success": True, "run-id": ID})
        self.says("stop", {"success": True})
        self.state("running", "N/A")
        self.nodes({})
        command = folder / "flwr"
        command.write_text(SCRIPT.format(python=sys.executable, folder=str(folder)))
        command.chmod(0o755)

    def says(self, command: str, answer: dict[str, Any]) -> None:
        (self._folder / command).write_text(f"Some words first\n{json.dumps(answer, indent=1)}\n")

    def state(self, status: str, details: str) -> None:
        self.says("list", {"success": True, "runs": [{"status": status, "status-details": details}]})

    def nodes(self, states: dict[str, str]) -> None:
        nodes = [{"node-id": node, "status": status} for node, status in states.items()]
        self.says("supernode", {"success": True, "nodes": nodes})

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self._folder / "notes").read_text().splitlines()]


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flwr:
    monkeypatch.setattr(
        "fedflame.engines.flower.engine.installed_command", lambda name, extra: str(tmp_path / name)
    )
    monkeypatch.setattr("fedflame.engines.watch.STATUS_SECONDS", (0.05,))
    (tmp_path / "ca.crt").touch()
    return Flwr(tmp_path)


@pytest.fixture
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def a_hub(folder: Path, where: str, **flower: Any) -> Hub:
    values = {"address": where, "root_certificates": "ca.crt", "nodes": {"a": 7, "b": int(ID)}} | flower
    rounds = HubRounds(round_timeout=1000.0)
    return Hub(sites=("a", "b"), rounds=rounds, flower=FlowerHub(**values), folder=folder)


def test_a_run_is_an_app_without_code_and_nothing_of_the_users_own_configuration(
    flwr: Flwr, address: str, tmp_path: Path
) -> None:
    engine = FlowerEngine(a_hub(tmp_path, address))
    assert engine.submit(Path("/run/hub.sock"), "the-key") == ID
    engine.stop(ID)  # otherwise it is watched for as long as this process lives
    note = flwr.notes()[0]
    assert note["asked"][0] == "run" and note["asked"][2:4] == ["hub", "--run-config"]
    assert note["project"] == ["pyproject.toml"]
    assert 'hub-socket = "/run/hub.sock"\njob-key = "the-key"\n' in note["run config"]
    assert f'nodes = "a=7,b={ID}"' in note["run config"]
    assert "message-seconds = 1600.0" in note["run config"]
    assert note["config"] == (
        f'[superlink.hub]\naddress = "{address}"\nroot-certificates = "{tmp_path}/ca.crt"\n'
    )
    assert note["env"]["FLWR_TELEMETRY_ENABLED"] == "0" and note["env"]["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert not Path(note["env"]["FLWR_HOME"]).exists()


def test_a_run_is_over_when_its_state_says_so_whatever_the_exit_code(
    flwr: Flwr, address: str, tmp_path: Path
) -> None:
    engine = FlowerEngine(a_hub(tmp_path, address))
    job = engine.submit(Path("/run/hub.sock"), "the-key")
    flwr.says("list", {"success": False, "error-message": "Using SuperLink\n\nis unavailable"})
    time.sleep(0.3)
    assert engine.ended(job) is None, "a SuperLink that is away may come back"
    flwr.state("finished:failed", "ServerApp failed")
    deadline = time.monotonic() + 20
    while (how := engine.ended(job)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert how == "finished:failed (ServerApp failed)"
    engine.stop(job)
    assert flwr.notes()[-1]["asked"][:3] == ["stop", ID, "hub"]


def test_the_words_of_a_refusal_are_told(flwr: Flwr, address: str, tmp_path: Path) -> None:
    flwr.says("run", {"success": False, "error-message": "Using SuperLink: hub\n\nNo such\nfederation"})
    with pytest.raises(OSError, match=r"^flwr run: No such federation$"):
        FlowerEngine(a_hub(tmp_path, address)).submit(Path("/run/hub.sock"), "the-key")
    (tmp_path / "run").write_text("no JSON at all")
    with pytest.raises(OSError, match=r"^flwr run: no JSON at all$"):
        FlowerEngine(a_hub(tmp_path, address)).submit(Path("/run/hub.sock"), "the-key")


def test_sites_are_connected_whose_nodes_are_online(flwr: Flwr, address: str, tmp_path: Path) -> None:
    engine = FlowerEngine(a_hub(tmp_path, address))
    flwr.nodes({"7": "offline", ID: "online", "99": "online"})
    assert engine.connected() == {"b"}
    flwr.says("supernode", {"success": False, "error-message": "is unavailable"})
    assert engine.connected() is None
    assert FlowerEngine(a_hub(tmp_path, address, nodes={})).connected() is None


def test_a_site_is_revoked_by_taking_its_node_from_the_superlink(
    flwr: Flwr, address: str, tmp_path: Path
) -> None:
    hub = tmp_path / "hub.toml"
    hub.write_text(
        f'sites = "a,b"\n[flower]\naddress = "{address}"\nroot_certificates = "ca.crt"\n'
        f'[flower.nodes]\na = "7"\nb = "{ID}"\n'
    )
    told = invoke("hub", "revoke", hub, "b")
    assert told.exit_code == 0, told.output
    assert flwr.notes()[-1]["asked"] == ["supernode", "unregister", ID, "hub", "--format", "json"]
    assert "Take b out of `sites` and `flower.nodes`" in told.output
    flwr.says("supernode", {"success": False, "error-message": "is unavailable"})
    told = invoke("hub", "revoke", hub, "b")
    assert told.output == "fedflame: b is not revoked: flwr supernode: is unavailable\n"
    assert told.exit_code == 2
    told = invoke("hub", "renew", hub)
    assert told.exit_code == 2 and told.output.startswith("fedflame: over Flower, the keys of sites have no")


def test_where_nodes_have_no_keys_nobody_can_be_revoked(flwr: Flwr, address: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"flower\.nodes has no a: only a node whose key is registered can be"
    ):
        FlowerEngine(a_hub(tmp_path, address, nodes={})).revoke("a")


@pytest.mark.parametrize(
    ("flower", "words"),
    [
        ({"address": "hub.example"}, "flower.address = 'hub.example': must be host and port"),
        ({"root_certificates": "none.crt"}, "flower.root_certificates: .*none.crt is no file"),
        ({"nodes": {"a": 7}}, "flower.nodes.b is missing"),
    ],
)
def test_a_section_that_cannot_be_used_is_refused_with_the_reason(
    flwr: Flwr, address: str, tmp_path: Path, flower: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        FlowerEngine(a_hub(tmp_path, address, **flower))


def test_insecure_is_said_only_where_the_file_says_it(flwr: Flwr, address: str, tmp_path: Path) -> None:
    FlowerEngine(a_hub(tmp_path, address, insecure=True, root_certificates="")).connected()
    assert flwr.notes()[0]["config"] == f'[superlink.hub]\naddress = "{address}"\ninsecure = true\n'
