"""An nvflare job: three JSON files that name installed classes. It contains no code."""

from __future__ import annotations

import json
from pathlib import Path

_APP = "app"
NAME = "fedflame"
"""Of every job of ours."""


def write_job(folder: Path, hub_socket: Path, job_key: str) -> None:
    """Write a job into a new folder."""
    relay = {"hub_socket": str(hub_socket), "job_key": job_key}
    server = {
        "format_version": 2,
        # Seconds. This is the shortest time that a round can take; nvflare's default is 2.
        "server": {"task_request_interval": 0.2},
        "task_data_filters": [],
        "task_result_filters": [],
        "workflows": [{"id": "relay", "path": "fedflame.engines.nvflare.relay.FedflameRelay", "args": relay}],
        "components": [],
    }
    client = {
        "format_version": 2,
        "executors": [
            {
                "tasks": ["fedflame"],
                "executor": {"path": "fedflame.engines.nvflare.executor.FedflameExecutor", "args": {}},
            }
        ],
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
    }
    meta = {
        "name": NAME,
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {_APP: ["@ALL"]},
    }
    config = folder / _APP / "config"
    config.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps(meta))
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "config_fed_client.json").write_text(json.dumps(client))
