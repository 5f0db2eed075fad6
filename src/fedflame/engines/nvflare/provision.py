"""Make the startup kits of a federation with nvflare's own provisioning, and narrow the rights in each kit.

In every kit, a job may use only our two classes. nvflare's own classes are not allowed, because some read
files that a job names. No role may send code. No site's log is sent to the hub.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509

from fedflame.engines.nvflare.revoked import revoked_names
from fedflame.errors import UserError
from fedflame.reading import read_object

CLASSES = (
    "fedflame.engines.nvflare.relay.FedflameRelay",
    "fedflame.engines.nvflare.executor.FedflameExecutor",
)
_LOGS = ("site_log_streamer", "log_receiver")
"""nvflare's components that send the sites' error logs to the hub; the first adds a class to every job."""
_CODE = ("byoc", "server-predeployed-flwr", "shell_commands")
"""Rights to send code or commands."""
AUTHORITY_DAYS = 3650
"""Days that a new authority lasts; nvflare lets the certificates that it signs last 360."""
DEAD_AFTER_SECONDS = 60
"""Seconds without a heartbeat after which a site counts as gone; nvflare's default is 600."""
JOBS = 1000
"""Jobs that nvflare may run at once. It is large because a killed server counts its last job as running."""


@dataclass(frozen=True)
class Federation:
    """The participants of a federation."""

    host: str
    """The hub's host name, as the sites resolve it. The server's certificate is issued for it."""
    port: int
    sites: Sequence[str]
    admins: Sequence[str]
    """Mail addresses of the administrators, who may start runs."""

    def names(self) -> list[str]:
        """Return the names of all that have a kit."""
        return [self.host, *self.sites, *self.admins]


def provision(command: str, folder: Path, federation: Federation) -> None:
    """Make kits for the server, each site and the administrator in `folder/kits`; keep those that exist.

    The certificate authority stays in `folder/provision`. A later call with more sites lets it sign their
    kits.

    Args:
        command: path of the `nvflare` command.
        folder: the hub's folder.
        federation: the participants.

    Raises:
        UserError: nvflare refuses the names, one of them was revoked, or the folder cannot be written.
    """
    kits = folder / "kits"
    refuse_revoked(kits / federation.host, federation.sites)
    made = make_kits(command, folder, federation)
    try:
        for name in federation.names():
            if not (kits / name).exists():
                add_kit(made / name, kits / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be provisioned: {error}") from error


def make_kits(command: str, folder: Path, federation: Federation) -> Path:
    """Let nvflare make the kits of a federation in `folder/provision`, with the authority that is there.

    Returns:
        The folder with a kit for each name. Who had a certificate before has the same.

    Raises:
        UserError: nvflare refuses the names, or the folder cannot be written.
    """
    workspace = folder / "provision"
    try:
        workspace.mkdir(parents=True, exist_ok=True, mode=0o700)
        project = workspace / "project.yml"
        project.write_text(_project(federation, _authority_days(folder)))
        return _run(command, project, workspace)
    except OSError as error:
        raise UserError(f"{folder}: cannot be provisioned: {error}") from error


def add_kit(made: Path, kit: Path) -> None:
    """Put a kit that nvflare has made where there is none. Raises OSError."""
    shutil.copytree(made, kit)
    _narrow(kit)


def refuse_revoked(server_kit: Path, sites: Iterable[str]) -> None:
    """Raise UserError at a site that was revoked: its old certificate would be admitted, too."""
    for site in sorted(revoked_names(server_kit).intersection(sites)):
        raise UserError(f"{site} was revoked, and its name stays so; give the site another name")


def authority_path(folder: Path) -> Path:
    """Return the path of the file in which nvflare keeps the authority and all certificates with keys."""
    return folder / "provision" / "fedflame" / "state" / "cert.json"


def _authority_days(folder: Path) -> int:
    """Return how long the authority that is there lasts in all, or a new one is to."""
    path = authority_path(folder)
    if not path.exists():
        return AUTHORITY_DAYS
    try:
        found = x509.load_pem_x509_certificate(str(read_object(path)["root_cert"]).encode())
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: not what nvflare keeps there: {error!r}; put back a copy of it") from error
    return (found.not_valid_after_utc - found.not_valid_before_utc).days


def _project(federation: Federation, authority_days: int) -> str:
    """Return nvflare's project file. It is YAML, of which JSON is a part."""
    participants: list[dict[str, Any]] = [
        {"name": federation.host, "type": "server", "org": "hub", "fed_learn_port": federation.port}
    ]
    participants += [
        {"name": site, "type": "client", "org": _organisation(site)} for site in federation.sites
    ]
    participants += [
        {"name": admin, "type": "admin", "org": "hub", "role": "lead"} for admin in federation.admins
    ]
    builders = [
        {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
        {
            "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
            "args": {"config_folder": "config", "scheme": "grpc"},
        },
        {"path": "nvflare.lighter.impl.cert.CertBuilder", "args": {"root_valid_days": authority_days}},
        {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
    ]
    project = {
        "api_version": 3,
        "name": "fedflame",
        "description": "fedflame",
        "participants": participants,
        "builders": builders,
    }
    return json.dumps(project, indent=1) + "\n"


def _organisation(site: str) -> str:
    """Return an organisation of the site alone, so that sites share no rights; only letters, digits and _."""
    return "".join(letter if letter.isalnum() else "_" for letter in site)


def _run(command: str, project: Path, workspace: Path) -> Path:
    """Run the provisioning and return the folder of the new kits."""
    asked = [command, "provision", "-p", str(project), "-w", str(workspace), "--force"]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(asked, cwd=elsewhere, capture_output=True, text=True, check=False)
    made = sorted((workspace / "fedflame").glob("prod_*"))
    if done.returncode or not made:
        words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        reason = next(
            (line for line in words if "nvalid" in line or "rror" in line), words[-1] if words else ""
        )
        raise UserError(f"nvflare provision: {reason.strip()}")
    return made[-1]


def _narrow(kit: Path) -> None:
    """Narrow the rights in the kit's `local` files. The owner of the kit may change these files later."""
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text())
    if "class_allow_list" in resources:
        resources["class_allow_list"] = CLASSES
        resources["components"] = [each for each in resources["components"] if each["id"] not in _LOGS]
        resources["allow_log_streaming"] = False
        for component in resources["components"]:
            _keep_out_of_the_temporary_folder(component, kit)
        for server in resources.get("servers", []):
            server["heart_beat_timeout"] = DEAD_AFTER_SECONDS
        if "snapshot_persistor" in resources:
            storage = resources["snapshot_persistor"]["args"]["storage"]["args"]
            storage["root_dir"] = str((kit / "snapshots").absolute())
        _write(local / "resources.json", resources)
    if (local / "authorization.json.default").exists():
        rights = json.loads((local / "authorization.json.default").read_text())
        for role, permissions in rights["permissions"].items():
            rights["permissions"][role] = _without_code(permissions)
        _write(local / "authorization.json", rights)


def _keep_out_of_the_temporary_folder(component: dict[str, Any], kit: Path) -> None:
    if component["id"] == "job_manager":
        component["args"]["uri_root"] = str((kit / "jobs").absolute())
    if component["id"] == "job_scheduler":
        component["args"]["max_jobs"] = JOBS


def _without_code(permissions: str | dict[str, str]) -> dict[str, str]:
    """Return the role's rights without those in `_CODE`."""
    rights = dict.fromkeys(
        ("submit_job", "clone_job", "manage_job", "download_job", "view", "operate"), permissions
    )
    known = rights if isinstance(permissions, str) else permissions
    return {**known, **dict.fromkeys(_CODE, "none")}  # type: ignore[dict-item]


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
