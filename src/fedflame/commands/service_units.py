"""systemd units: a service that is started again whenever it ends."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Mapping
from pathlib import Path


def service_unit(
    description: str, command: str, folder: Path, environment: Mapping[str, str], restart_seconds: int = 5
) -> str:
    """The text of a unit that runs as the user who makes it, with this Python first in the path."""
    search = f"{Path(sys.executable).parent}:{os.defpath}"
    variables = {"PATH": search, **environment}
    lines = "\n".join(f'Environment="{name}={value}"' for name, value in variables.items())
    return f"""\
[Unit]
Description={description}
After=network-online.target
Wants=network-online.target

[Service]
User={getpass.getuser()}
WorkingDirectory={folder}
{lines}
ExecStart={command}
Restart=always
RestartSec={restart_seconds}
# Every process that it has started ends with it.
KillMode=control-group

[Install]
WantedBy=multi-user.target
"""
