"""Find the commands that engines install. Each runs as a process of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedflame.errors import UserError


def installed_command(name: str, extra: str) -> str:
    """Return the path of a command in this Python's environment, or else on `PATH`.

    Args:
        name: the name of the command.
        extra: the extra of fedflame that installs it.

    Raises:
        UserError: the command is not installed.
    """
    beside = Path(sys.executable).with_name(name)
    command = str(beside) if beside.exists() else shutil.which(name)
    if command is None:
        raise UserError(f"{name} is not installed; pip install 'fedflame[{extra}]'")
    return command
