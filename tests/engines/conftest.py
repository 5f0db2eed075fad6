"""The experiment that runs over both engines, and in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.preloaded import command_words

from loopback import fedflame

EXPERIMENT = """\
[data]
max_rows = 500
[clients]
num_clients = 3
active_experts = "8,4,1"
[training]
max_steps = 3
learning_rate = 0.001 # no count becomes more than eight times the even one, which is all that a hub believes
[server]
num_server_rounds = 2
fraction_evaluate = 1
[evaluation]
rows_per_category = 1
client_test_size = 0.03
max_new_tokens = 1
evaluate_every = 0
generate_every = 0
"""


@pytest.fixture(scope="session")
def forked_commands() -> Iterator[None]:
    """`fedflame` commands of federations start from a process that has imported torch once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loopback.FEDFLAME", command_words())
        yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experiment") / "experiment.toml"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(scope="module")
def unscored(experiment: Path) -> Path:
    """The experiment of the same sites, which are not asked to score; the bytes are the same."""
    path = experiment.with_name("unscored.toml")
    path.write_text(EXPERIMENT.replace("fraction_evaluate = 1\n", ""))
    return path


@pytest.fixture(scope="module")
def finished(experiment: Path, forked_commands: None) -> Path:
    """The experiment in one process."""
    run = experiment.parent / "one-process"
    done = fedflame("run", experiment, "--output-dir", run)
    assert done.returncode == 0, done.stdout
    return run
