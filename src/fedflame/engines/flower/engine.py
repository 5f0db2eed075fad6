"""Start, watch and stop Flower runs through the `flwr` command.

The command gets a temporary Flower configuration that holds only the SuperLink's address. It never reads or
changes the user's own configuration. We trust its JSON output and not its exit code, which is 0 even for a
failed run that was streamed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedflame.engines.address import host_and_port
from fedflame.engines.command import installed_command
from fedflame.engines.flower.job import Assignment, check_nodes, message_seconds, write_job
from fedflame.engines.hub import Hub
from fedflame.engines.watch import JobWatch
from fedflame.errors import UserError

COMMAND_SECONDS = 60.0
CONNECT_SECONDS = 5.0
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment of every Flower process that we start. It switches off telemetry and the update check."""
_CONNECTION = "hub"


class FlowerEngine:
    """One SuperLink, for a user who may start runs at it."""

    def __init__(self, hub: Hub) -> None:
        """Read the settings from the hub's file and check that the SuperLink listens.

        Raises:
            UserError: flwr is not installed, the [flower] section of the file is missing or wrong, or nothing
                listens at its address.
        """
        self._command, self._hub, self._watch = installed_command("flwr", "flower"), hub, JobWatch()
        check_nodes(hub)
        self._connection = _connection(hub)

    def submit(self, hub_socket: Path, job_key: str) -> str:
        """See `Engine.submit`."""
        hub = self._hub
        seconds = message_seconds(hub)
        assignment = Assignment(hub_socket, job_key, seconds, hub.site_names(), hub.flower.nodes)
        with tempfile.TemporaryDirectory(prefix="fedflame-run-") as folder:
            app, run_config = write_job(Path(folder), assignment)
            run = str(self._ask("run", str(app), _CONNECTION, "--run-config", str(run_config))["run-id"])
        self._watch.begin(run, partial(self._over, run))
        return run

    def ended(self, job: str) -> str | None:
        """See `Engine.ended`; the result of the last status query."""
        return self._watch.ended(job)

    def stop(self, job: str) -> None:
        """See `Engine.stop`. A connected run ends with the driver's connection; this stops others too."""
        self._watch.forget(job)
        with suppress(OSError):  # the run is over already, or the SuperLink is away
            self._ask("stop", job, _CONNECTION)

    def connected(self) -> set[str] | None:
        """See `Engine.connected`. Without node authentication, nodes give their names only during a run."""
        nodes = self._hub.flower.nodes
        if not nodes:
            return None
        try:
            online = self.online()
        except OSError:
            return None
        return {site for site, node in nodes.items() if node in online}

    def revoke(self, site: str) -> None:
        """Take a site's key from those that the SuperLink admits.

        Raises:
            UserError: nodes are not known by their keys here, so that nobody can be shut out.
            OSError: the SuperLink does not take it.
        """
        nodes = self._hub.flower.nodes
        if site not in nodes:
            raise UserError(
                f"hub file: flower.nodes has no {site}: only a node whose key is registered can be shut out, "
                "of a SuperLink with --enable-supernode-auth (docs/flower.md)"
            )
        self._ask("supernode", "unregister", str(nodes[site]), _CONNECTION)

    def online(self) -> set[int]:
        """Return the nodes that the SuperLink reaches. Raises OSError if it does not answer."""
        nodes = self._ask("supernode", "list", _CONNECTION)["nodes"]
        return {int(node["node-id"]) for node in nodes if node["status"] == "online"}

    def _over(self, run: str) -> str | None:
        """Return why the run is over; None while it runs."""
        [found] = self._ask("list", _CONNECTION, "--run-id", run)["runs"]
        status = str(found["status"])
        return f"{status} ({found['status-details']})" if status.startswith("finished") else None

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run `flwr` and return its JSON. Raises OSError with the command's own message if it fails."""
        said = f"flwr {arguments[0]}"
        with tempfile.TemporaryDirectory(prefix="fedflame-flwr-") as home:
            (Path(home) / "config.toml").write_text(self._connection)
            try:
                done = subprocess.run(
                    [self._command, *arguments, "--format", "json"],
                    env=os.environ | QUIET | {"FLWR_HOME": home},
                    capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise OSError(f"{said} took more than {COMMAND_SECONDS:.0f} s") from error
        answer = _json_object(done.stdout)
        if answer.get("success") is not True:
            words = str(answer.get("error-message") or done.stderr or done.stdout)
            reason = words.strip().rpartition("\n\n")[2]  # the part after the description of the step
            raise OSError(f"{said}: {' '.join(reason.split()) or 'no output'}")
        return answer


def _connection(hub: Hub) -> str:
    """Return a Flower configuration (TOML) with only this SuperLink, after a check that it listens."""
    flower = hub.flower
    where = host_and_port(flower.address, "hub file: flower.address")
    try:
        socket.create_connection(where, CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"hub file: flower.address = {flower.address!r}: no SuperLink there: {error}"
        ) from error
    lines = [f"[superlink.{_CONNECTION}]", f"address = {json.dumps(flower.address)}"]
    if flower.insecure:
        lines.append("insecure = true")
    if flower.root_certificates:
        certificates = hub.folder / flower.root_certificates
        if not certificates.is_file():
            raise UserError(f"hub file: flower.root_certificates: {certificates} is no file")
        lines.append(f"root-certificates = {json.dumps(str(certificates))}")
    return "\n".join(lines) + "\n"


def _json_object(text: str) -> dict[str, Any]:
    """Return the JSON object at the end of the command's output; empty if there is none."""
    try:
        value = json.loads(text[text.find("{") :])
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
