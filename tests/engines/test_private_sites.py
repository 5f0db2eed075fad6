"""Private rounds at sites: with the same draws, the bytes of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engines.sites_of_a_run import KS, NAMES, a_hub, make_sites, run_over
from tests.engines_here import ThreadEngine, asking, trainers
from tests.open_draws import draw_openly
from tests.tiny_runs import adapter_bytes, events, state_bytes, tiny_run

PRIVATE = ("privacy.unit=row", "privacy.epsilon=6", "server.num_server_rounds=2")


@pytest.mark.slow
def test_with_the_same_draws_sites_end_in_the_bytes_of_one_process(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, at_sites = tmp_path / "own", tmp_path / "at-sites"
    site_files = make_sites(tiny_folder, tmp_path, KS).values()
    with monkeypatch.context() as patch:
        draw_openly(patch)
        tiny_run(tiny_folder, own, *PRIVATE)
        with trainers([*site_files]) as sites:
            run_over(ThreadEngine(asking(sites), set(NAMES)), a_hub(NAMES), tiny_folder, at_sites, *PRIVATE)
    assert state_bytes(own) == state_bytes(at_sites) and adapter_bytes(own) == adapter_bytes(at_sites)
    assert events(own, "privacy") == events(at_sites, "privacy") != []
