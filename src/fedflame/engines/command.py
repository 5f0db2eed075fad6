"""The commands that engines bring, each run as a process of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedflame.errors import UserError


def installed_command(name: str, extra: str) -> str:
    """Path of a command in this Python's environment, or in the path.

    Args:
        name: the command's.
        extra: of fedflame, which installs it.

    Raises:
        UserError: there is none.
    """
    beside = Path(sys.executable).with_name(name)
    command = str(beside) if beside.exists() else shutil.which(name)
    if command is None:
        raise UserError(f"{name} is not installed; pip install 'fedflame[{extra}]'")
    return command
