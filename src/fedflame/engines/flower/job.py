"""The app of a Flower run: a project file that names installed modules. It contains no code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedflame.engines.hub import Hub
from fedflame.errors import UserError

PROJECT = """\
[project]
name = "fedflame"
version = "1.0.0"
description = "Carries envelopes between fedflame's driver and the trainers of the sites"
license = "Apache-2.0"
dependencies = [] # what is installed is used; with any, Flower makes an environment for every run

[tool.flwr.app]
publisher = "fedflame"

[tool.flwr.app.components]
serverapp = "fedflame.engines.flower.server_app:app"
clientapp = "fedflame.engines.flower.client_app:app"

[tool.flwr.app.config]
hub-socket = ""
job-key = ""
message-seconds = 0.0
sites = ""
nodes = ""
"""
"""The same project file for every run, so that nodes install the app only once."""

LATE_SECONDS = 600.0
"""Seconds that a message outlives its round, so that late answers arrive and the driver can report them."""


@dataclass(frozen=True)
class Assignment:
    """The values that the ServerApp needs; Flower's run config carries them."""

    hub_socket: Path
    """The driver's socket."""
    job_key: str
    """The key that the driver drew for this job."""
    message_seconds: float
    """Seconds after which the SuperLink may drop a message or its reply."""
    sites: Sequence[str]
    nodes: Mapping[str, int]
    """Site -> registered node. If empty, the nodes are asked for their names."""

    def to_run_config(self) -> dict[str, str | float]:
        """Return the values for Flower's run config."""
        return {
            "hub-socket": str(self.hub_socket),
            "job-key": self.job_key,
            "message-seconds": self.message_seconds,
            "sites": ",".join(self.sites),
            "nodes": ",".join(f"{site}={node}" for site, node in self.nodes.items()),
        }

    @classmethod
    def from_run_config(cls, values: Mapping[str, object]) -> Assignment:
        """Read the run config that Flower passes to the ServerApp."""
        pairs = (pair.rpartition("=") for pair in str(values["nodes"]).split(",") if pair)
        return cls(
            Path(str(values["hub-socket"])),
            str(values["job-key"]),
            float(str(values["message-seconds"])),
            str(values["sites"]).split(","),
            {site: int(node) for site, _, node in pairs},
        )


def write_job(folder: Path, assignment: Assignment) -> tuple[Path, Path]:
    """Write the app's folder and, beside it, the run config of one job; return both paths."""
    app, run_config = folder / "app", folder / "run.toml"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    values = assignment.to_run_config()
    run_config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    return app, run_config


def message_seconds(hub: Hub) -> float:
    """Return the seconds that a message to a site and its reply may take."""
    return hub.rounds.round_timeout + LATE_SECONDS


def check_nodes(hub: Hub) -> None:
    """Raise UserError if a site lacks a node, a node has no site, or two sites have the same node."""
    sites, nodes = hub.site_names(), hub.flower.nodes
    if not nodes:
        return
    if missing := [site for site in sites if site not in nodes]:
        raise UserError(f"hub file: flower.nodes.{missing[0]} is missing; every site needs its node's id")
    if strange := [site for site in nodes if site not in sites]:
        raise UserError(f"hub file: flower.nodes.{strange[0]}: no such site; sites has {', '.join(sites)}")
    if len(set(nodes.values())) < len(nodes):
        raise UserError("hub file: flower.nodes: two sites have the same node")
