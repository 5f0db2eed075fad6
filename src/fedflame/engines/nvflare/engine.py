"""Submit and watch NVIDIA FLARE jobs through the `nvflare` command.

The command runs as its own process, so that nvflare and torch never share one. Its JSON output is read. A job
is over when its status says so, or when its server has been restarted: jobs of the former server keep the
status `RUNNING` for ever.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedflame.engines.command import installed_command
from fedflame.engines.hub import Hub
from fedflame.engines.nvflare.job import write_job
from fedflame.engines.nvflare.job_folders import superfluous_jobs
from fedflame.engines.watch import JobWatch
from fedflame.errors import UserError

COMMAND_SECONDS = 60.0
_NO_REPLY = "no_reply"


def nvflare_command() -> str:
    """Return the path of `nvflare`. Raises UserError as `installed_command` does."""
    return installed_command("nvflare", "nvflare")


class NvflareEngine:
    """One federation, for an administrator who may submit jobs."""

    def __init__(self, hub: Hub) -> None:
        """Read the administrator's kit from the hub's file.

        Raises:
            UserError: nvflare is not installed, or the file does not name an administrator's kit.
        """
        self._command = nvflare_command()
        self._kit = (hub.folder / hub.nvflare.admin_kit).absolute()
        if not hub.nvflare.admin_kit or not (self._kit / "startup" / "fed_admin.json").is_file():
            raise UserError(
                f"hub file: nvflare.admin_kit = {hub.nvflare.admin_kit!r}: no kit of an administrator "
                f"(no startup/fed_admin.json in {self._kit})"
            )
        self._watch = JobWatch()

    def submit(self, hub_socket: Path, job_key: str) -> str:
        """See `Engine.submit`."""
        started = self._status()["server_start_time"]
        with tempfile.TemporaryDirectory(prefix="fedflame-job-") as folder:
            write_job(Path(folder) / "job", hub_socket, job_key)
            job = str(self._ask("job", "submit", "-j", f"{folder}/job")["job_id"])
        self._watch.begin(job, partial(self._over, job, started))
        threading.Thread(target=self._prune, daemon=True).start()
        return job

    def _prune(self) -> None:
        """Delete old jobs from the hub's store; what cannot be deleted now, a later job tries again."""
        with suppress(OSError):
            for job in superfluous_jobs(self._answer("job", "list")):
                self._ask("job", "delete", job, "--force")

    def ended(self, job: str) -> str | None:
        """See `Engine.ended`; the result of the last status query."""
        return self._watch.ended(job)

    def stop(self, job: str) -> None:
        """See `Engine.stop`. The relay ends by itself when the driver closes its connection."""
        self._watch.forget(job)

    def revoke(self, site: str) -> None:
        """Let the server admit a site no longer. Raises OSError if it does not take it."""
        state = self._ask("system", "disable-client", site, "--force").get("state")
        if state != "disabled":
            raise OSError(f"nvflare system disable-client: the state of {site} is {state!r}")

    def connected(self) -> set[str] | None:
        """See `Engine.connected`."""
        try:
            answers = self._status()["client_status"]
        except OSError:
            return None
        # A site that has gone stays registered until its heartbeat is missed.
        return {str(site["client_name"]) for site in answers if site["status"] != _NO_REPLY}

    def _over(self, job: str, server_start: float) -> str | None:
        """Return why the job is over; None while it runs."""
        if self._status()["server_start_time"] != server_start:
            return "FINISHED: its server has been started anew"
        status = str(self._ask("job", "meta", job)["status"])
        return status if status.startswith("FINISHED") else None

    def _status(self) -> dict[str, Any]:
        return self._ask("system", "status")

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Return the object that `nvflare` answers. Raises OSError as `_answer` does."""
        data = self._answer(*arguments)
        if not isinstance(data, dict):
            raise OSError(f"nvflare {' '.join(arguments[:2])}: {data!r} is no object")
        return data

    def _answer(self, *arguments: str) -> Any:
        """Run `nvflare` and return `data` of its answer. Raises OSError with its message if it fails.

        It runs in the kit: nvflare looks for settings of its own in all that is below the working folder.
        """
        command = [self._command, *arguments, "--startup-kit", str(self._kit), "--format", "json"]
        said = f"nvflare {' '.join(arguments[:2])}"
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False, cwd=self._kit
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{said} took more than {COMMAND_SECONDS:.0f} s") from error
        answer = _json_object(done.stdout)
        if answer.get("status") != "ok":
            words = str(answer.get("message") or done.stderr.strip() or done.stdout.strip() or "no output")
            raise OSError(f"{said}: {words.splitlines()[-1]}")
        return answer.get("data")


def _json_object(text: str) -> dict[str, Any]:
    """Return the JSON object of the last line that starts with one; empty if there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                value = json.loads(line)
            except ValueError:
                continue
            return value if isinstance(value, dict) else {}
    return {}
