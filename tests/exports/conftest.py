"""Tiny models on disk, states of runs on them, and their exported adapters."""

from pathlib import Path

import pytest
from tests.exports.both_layouts import LAYOUTS, Export
from tests.tiny_exports import adapt, random_state, run_config, save_base

from fedflame.experiment.adapter_folder import trained_run
from fedflame.exports import export_adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ServerState


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("olmoe", tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(scope="module")
def adapted(base: Path) -> AdaptedModel:
    return adapt(base)


@pytest.fixture(scope="module")
def state(adapted: AdaptedModel) -> ServerState:
    return random_state(adapted)


@pytest.fixture
def exported(base: Path, adapted: AdaptedModel, state: ServerState, tmp_path: Path) -> Path:
    export_adapter(state, trained_run(run_config(base), 4), adapted.model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    """Of every family, by its name."""
    found = {}
    for kind, layouts in LAYOUTS.items():
        work = tmp_path_factory.mktemp(kind)
        base = save_base(kind, work / "base")
        adapted = adapt(base)
        state = random_state(adapted)
        folders = {layout: work / layout for layout in layouts}
        for layout, folder in folders.items():
            export_adapter(state, trained_run(run_config(base), 1), adapted.model, folder, layout=layout)
        found[kind] = Export(base, adapted, state, folders)
    return found
