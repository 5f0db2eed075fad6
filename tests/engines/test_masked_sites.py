"""Masked sums over sites: the bytes of one process, whoever drops out, and nothing but sums for the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.engines.sites_of_a_run import a_hub, make_sites, run_over
from tests.engines_here import ThreadEngine, asking, trainers
from tests.tiny_runs import adapter_bytes, events, state_bytes, tiny_run

from fedflame.engines.hub import Hub
from fedflame.errors import UserError
from fedflame.privacy.identity import identity, public
from fedflame.wire.envelope import Envelope

NAMES = ("east", "north", "south", "west")
MASKED = ("clients.num_clients=4", "clients.active_experts=2", "privacy.secure_aggregation=true")


@pytest.fixture
def site_files(tiny_folder: Path, tmp_path: Path) -> list[Path]:
    """Four sites of equal k, each with the keys of the others."""
    files = make_sites(tiny_folder, tmp_path, dict.fromkeys(NAMES, 2), *MASKED)
    keys = {name: public(identity(path.parent / "state")) for name, path in files.items()}
    for name, path in files.items():
        others = "".join(f'{other} = "{key}"\n' for other, key in keys.items() if other != name)
        path.write_text(f"{path.read_text()}[peers]\n{others}")
    return list(files.values())


def hub() -> Hub:
    return a_hub(NAMES, rejoin_timeout=0, max_resubmissions=0)


def states(run: Path) -> tuple[object, object]:
    return state_bytes(run), adapter_bytes(run)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("more", [(), ("communication.update_dtype=int8", "strategy.temperature=0")])
def test_four_sites_give_the_bytes_of_one_process_and_no_loss(
    more: Sequence[str], site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    own, at_sites = tmp_path / "own", tmp_path / "at-sites"
    tiny_run(tiny_folder, own, *MASKED, *more)
    with trainers(site_files) as sites:
        run_over(ThreadEngine(asking(sites), set(NAMES)), hub(), tiny_folder, at_sites, *MASKED, *more)
    assert states(own) == states(at_sites)
    found = events(at_sites, "client")
    assert len(found) == 12 and all(one["loss"] is None and not one["counts"] for one in found)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_who_is_not_ready_is_in_no_sum_and_who_is_lost_after_the_list_costs_one_round(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    """East does not train in round 1, and does not answer the list of round 2."""
    seen: list[tuple[str, str]] = []
    with trainers(site_files) as sites:
        ask = asking(sites)

        def deliver(site: str, content: bytes) -> bytes:
            header = Envelope.from_bytes(content).header
            kind = str(header["kind"])
            seen.append((site, kind))
            trained = seen.count((site, "train"))
            if site == "east" and (kind, trained) in (("train", 1), ("sum", 2)):
                echoed = {name: header[name] for name in ("ticket", "run", "site")}
                return Envelope({**echoed, "kind": "failed", "reason": "the machine burns"}, b"").to_bytes()
            return ask(site, content)

        run = tmp_path / "run"
        shown = run_over(ThreadEngine(deliver, set(NAMES)), hub(), tiny_folder, run, *MASKED)
    rounds = [
        sorted(one["client"] for one in events(run, "client") if one["round"] == at) for at in (1, 2, 3)
    ]
    assert rounds == [[1, 2, 3], [], [0, 1, 2, 3]]
    lost = [one["reason"] for one in events(run, "excluded") if one["round"] == 2]
    assert len(lost) == 4 and all("its group has no sum: east: the machine burns" in one for one in lost)
    assert "round 2: west is left out: its group has no sum" in shown


@pytest.mark.timeout(120)
def test_a_site_with_peers_tells_no_update_outside_a_sum(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    with trainers(site_files) as sites, pytest.raises(UserError, match="0 usable updates"):
        run_over(ThreadEngine(asking(sites), set(NAMES)), hub(), tiny_folder, tmp_path / "run", *MASKED[:2])
    reasons = {one["reason"] for one in events(tmp_path / "run", "excluded")}
    assert reasons == {
        "the site refuses: this site's updates are seen in sums with its peers only ([peers]); set "
        "privacy.secure_aggregation = true"
    }
