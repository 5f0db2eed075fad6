"""The experiment that runs over both engines, and in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopback import fedflame

EXPERIMENT = """\
[data]
max_rows = 400
[clients]
num_clients = 3
active_experts = "8,4,1"
[training]
max_steps = 3
[server]
num_server_rounds = 3
[evaluation]
rows_per_category = 1
max_new_tokens = 1
generate_every = 0
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experiment") / "experiment.toml"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(scope="module")
def finished(experiment: Path) -> Path:
    """The experiment in one process."""
    run = experiment.parent / "one-process"
    done = fedflame("run", experiment, "--output-dir", run)
    assert done.returncode == 0, done.stdout
    return run
