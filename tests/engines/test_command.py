"""Commands that engines install are found beside this Python, or else on the path, or named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedflame.engines.command import installed_command
from fedflame.errors import UserError


def test_a_command_beside_this_python_goes_before_one_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, elsewhere = tmp_path / "environment" / "flwr", tmp_path / "path" / "flwr"
    monkeypatch.setattr("fedflame.engines.command.sys.executable", str(beside.with_name("python")))
    monkeypatch.setenv("PATH", str(elsewhere.parent))
    with pytest.raises(UserError, match=r"^flwr is not installed; pip install 'fedflame\[flower\]'$"):
        installed_command("flwr", "flower")
    for command in (elsewhere, beside):
        command.parent.mkdir()
        command.touch(mode=0o755)
        assert installed_command("flwr", "flower") == str(command)
