"""Jobs of NVIDIA FLARE that are none of ours, and what becomes of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loopback import Loopback

CODE = """
from nvflare.apis.executor import Executor
class Spy(Executor):
    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        open({path!r}, "w").write("was here")
        return shareable
"""
STRANGER = "nvflare.app_common.np.np_trainer.NPTrainer"
"""A class of nvflare's own, which its own kits let every job build."""


def write_foreign_job(job: Path, executor: str) -> Path:
    """A job with this executor; its custom folder."""
    (job / "app" / "config").mkdir(parents=True)
    (job / "meta.json").write_text(
        '{"name": "foreign", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}}'
    )
    flow = {
        "id": "x",
        "path": "fedflame.engines.nvflare.relay.FedflameRelay",
        "args": {"hub_socket": "/x", "segment": "x"},
    }
    server = {"format_version": 2, "workflows": [flow], "components": []}
    client = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": {"path": executor}}],
        "components": [],
    }
    (job / "app" / "config" / "config_fed_server.json").write_text(json.dumps(server))
    (job / "app" / "config" / "config_fed_client.json").write_text(json.dumps(client))
    return job / "app" / "custom"


def in_the_end(federation: Loopback, job: Path) -> dict[str, Any]:
    """What nvflare says of a job that the administrator submits, once it is over."""
    kit = str(federation.hub_file.parent / "kits" / "researcher@hub.example")
    told = nvflare_job(kit, "submit", "-j", str(job))
    deadline, found = time.monotonic() + 150, dict[str, Any]()
    while not found.get("status", "").startswith("FINISHED") and time.monotonic() < deadline:
        time.sleep(1)
        found = nvflare_job(kit, "meta", told["job_id"])
    return found


def nvflare_job(kit: str, *words: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("nvflare")), "job", *words, "--startup-kit", kit]
    done = subprocess.run(
        [*command, "--format", "json"], capture_output=True, text=True, check=False, cwd=kit
    )
    data: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["data"]
    return data


def said(kit: Path) -> str:
    """All that is in the logs of a kit and of its jobs."""
    return "".join(path.read_text(errors="replace") for path in kit.rglob("*log.txt"))
