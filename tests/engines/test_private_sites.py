"""Private rounds at sites: with the same draws, the bytes of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.engines.test_engine_run import NAMES, hub, run_over, site_files
from tests.engines_here import ThreadEngine, asking, trainers
from tests.tiny_runs import adapter_bytes, events, state_bytes, tiny_run

from fedflame.privacy.noise import Noise
from fedflame.seeds import derive_seed

__all__ = ["site_files"]
PRIVATE = ("privacy.unit=row", "privacy.epsilon=6", "server.num_server_rounds=2")


def test_with_the_same_draws_sites_end_in_the_bytes_of_one_process(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_draws(self: Noise, count: int, *purpose: int | str) -> np.ndarray:
        return np.random.default_rng(derive_seed(*purpose)).uniform(1e-12, 1, count)

    own, at_sites = tmp_path / "own", tmp_path / "at-sites"
    with monkeypatch.context() as patch:
        patch.setattr(Noise, "_uniform", open_draws)
        tiny_run(tiny_folder, own, *PRIVATE)
        with trainers(site_files) as sites:
            run_over(ThreadEngine(asking(sites), set(NAMES)), hub(), tiny_folder, at_sites, *PRIVATE)
    assert state_bytes(own) == state_bytes(at_sites) and adapter_bytes(own) == adapter_bytes(at_sites)
    assert events(own, "privacy") == events(at_sites, "privacy") != []
