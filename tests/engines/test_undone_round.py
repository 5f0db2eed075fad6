"""A round over sites that is undone: the sites are asked again, and the one that caused it is left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.altered_answers import huge, skip
from tests.engines.sites_of_a_run import a_hub, make_sites, run_over
from tests.engines_here import ThreadEngine, asking, trainers
from tests.tiny_runs import adapter_bytes, events, tiny_run

from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.server import updates
from fedflame.wire.envelope import Bytes

SHAPE = (
    "clients.num_clients=2",
    "clients.active_experts=2,1",
    "training.max_steps=1",
    "server.num_server_rounds=3",
    "strategy.clip=none",
)


@pytest.mark.slow
def test_a_round_over_sites_is_undone_without_the_site_that_caused_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, arrived = updates.decode_update, Counter[tuple[int, int]]()

    def huge_in_round_two(message: Bytes, plan: RoundPlan) -> ClientUpdate:
        arrived[plan.round, plan.client] += 1
        update = read(message, plan)
        return huge(update, plan) if (plan.round, plan.client) == (2, 1) else update

    files = make_sites(tiny_folder, tmp_path, {"site-0": 2, "site-1": 1}, *SHAPE)
    hub = a_hub(files, rejoin_timeout=0, round_timeout=60)
    with monkeypatch.context() as patch, trainers(list(files.values())) as sites:
        patch.setattr(updates, "decode_update", huge_in_round_two)
        patch.setattr(updates, "require_within_reach", lambda *_: None)
        shown = run_over(
            ThreadEngine(asking(sites), set(files)), hub, tiny_folder, tmp_path / "sites", *SHAPE
        )
    assert arrived == {(1, 0): 1, (1, 1): 1, (2, 0): 2, (2, 1): 2, (3, 0): 1, (3, 1): 1}
    assert "round 2 is undone" in shown and "site-1 is left out: by its update alone" in shown
    assert [event["client"] for event in events(tmp_path / "sites", "excluded")] == [1]
    skip(monkeypatch, {(2, 1)})
    tiny_run(tiny_folder, tmp_path / "here", *SHAPE)
    assert adapter_bytes(tmp_path / "sites") == adapter_bytes(tmp_path / "here")
