"""What every test shares: no hub, no GPU, and the folder of real instruction data where there is one."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

gc.disable()  # while everything is imported: nothing of that is garbage, and looking for some takes long
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads both once
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # also where there are cards, the tests compute on the CPU

settings.register_profile("local", max_examples=25, deadline=None)
settings.register_profile("checked", settings.get_profile("ci"), max_examples=30)  # the same ones each time
settings.load_profile("checked" if os.environ.get("CI") else "local")

CHECKOUT = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("FEDFLAME_SHARED_DATA", CHECKOUT.parent / "shared" / "data"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("shared_data") and not SHARED_DATA.is_dir():
        pytest.skip(f"no shared data: {SHARED_DATA} is not a folder (FEDFLAME_SHARED_DATA names another)")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real instruction data; for tests marked `shared_data`."""
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OLMoE with its tokenizer, saved as Hugging Face saves it."""
    from tests.tiny_models import character_tokenizer, tiny_olmoe

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_olmoe().save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The finished `tiny_run` with these overrides, one for all tests; to be asked for before any patch.

    A test reads it, or changes a copy.
    """
    from tests.tiny_runs import tiny_run

    runs: dict[frozenset[str], Path] = {}

    def run_with(*overrides: str) -> Path:
        key = frozenset(overrides)
        if key not in runs:
            run = tmp_path_factory.mktemp("undisturbed") / "run"
            tiny_run(tiny_folder, run, *overrides)
            runs[key] = run
        return runs[key]

    return run_with
