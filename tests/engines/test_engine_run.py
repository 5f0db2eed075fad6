"""Runs over an engine: the bytes of a run in one process, whatever the engine and the sites do in between."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.engines.sites_of_a_run import KS, NAMES, a_hub, make_sites, run_over
from tests.engines_here import ThreadEngine, asking, trainers
from tests.fake_cards import fake_cards, load_on_cpu
from tests.tiny_runs import (
    ONE_ROUND,
    adapter_bytes,
    events,
    state_bytes,
    tiny_config,
    tiny_run,
)

from fedflame.cost.memory import least_evaluation_memory
from fedflame.cost.model_shape import read_model_shape
from fedflame.engines.link import HubLink
from fedflame.errors import UserError
from fedflame.wire.envelope import Envelope


@pytest.fixture
def site_files(tiny_folder: Path, tmp_path: Path) -> list[Path]:
    return list(make_sites(tiny_folder, tmp_path, KS).values())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_three_sites_give_the_bytes_of_one_process(
    undisturbed: Callable[..., Path], site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    finished = undisturbed()
    with trainers(site_files) as sites:
        shown = run_over(ThreadEngine(asking(sites), set(NAMES)), a_hub(NAMES), tiny_folder, tmp_path / "run")
    assert state_bytes(tmp_path / "run") == state_bytes(finished)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished)
    table = shown[shown.index("Sites; steps and training FLOPs per round") :]
    assert all(re.search(rf"^ +{name} .* its own ", table, re.M) for name in NAMES), "not the hub's own rows"
    assert re.search(r"round 1: south \(k=\d\) loss ", shown)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("setting", ["training.packing=true", "training.padding_free=true"])
def test_three_sites_that_train_side_by_side_lay_rows_out_as_one_process_does(
    setting: str, site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_run(tiny_folder, tmp_path / "alone", setting, ONE_ROUND)
    with trainers(site_files) as sites:
        engine = ThreadEngine(asking(sites), set(NAMES))
        run_over(engine, a_hub(NAMES), tiny_folder, tmp_path / "run", setting, ONE_ROUND)
    assert state_bytes(tmp_path / "run") == state_bytes(tmp_path / "alone")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "alone")


@pytest.mark.timeout(120)
def test_the_card_of_a_hub_needs_room_for_an_evaluation_only(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny_config(tiny_folder, tmp_path).adapter
    shape, setting = read_model_shape(tiny_folder), (adapter.r, adapter.target_modules, "float32")
    needed = least_evaluation_memory(shape, *setting)  # type: ignore[arg-type]
    with trainers(site_files) as sites:
        asked = load_on_cpu(monkeypatch, "fedflame.experiment.assemble")
        fake_cards(monkeypatch, tmp_path, (needed,))
        settings = ("server.num_server_rounds=1", "model.dtype=float32")
        run_over(
            ThreadEngine(asking(sites), set(NAMES)), a_hub(NAMES), tiny_folder, tmp_path / "run", *settings
        )
    assert asked == ["cuda:0"] and adapter_bytes(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_half_that_a_method_freezes_is_sent_once(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    method = ("strategy.name=ffa_lora", "strategy.active_experts=1")
    with trainers(site_files) as sites:
        run_over(
            ThreadEngine(asking(sites), set(NAMES)), a_hub(NAMES), tiny_folder, tmp_path / "run", *method
        )
    tiny_run(tiny_folder, tmp_path / "here", *method)
    assert state_bytes(tmp_path / "run") == state_bytes(tmp_path / "here")
    first, *later = ([e["bytes_down"] for e in events(tmp_path / "run", "client") if e["round"] == number]
                     for number in (1, 2, 3))  # fmt: skip
    assert all(max(sizes) < 0.7 * min(first) for sizes in later)


class SouthComesLate(ThreadEngine):
    """It is there once another site has trained."""

    def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
        super()._carry(link, sites, ticket, site, content)
        if Envelope.from_bytes(content).header["kind"] == "train":
            self.reachable.add("south")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_site_that_nobody_knew_at_the_start_takes_part_from_when_it_is_there(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    with trainers(site_files) as sites:
        engine = SouthComesLate(asking(sites), {"north", "west"})
        run_over(engine, a_hub(NAMES, rejoin_timeout=0.0), tiny_folder, tmp_path / "run")
    took_part = {(event["round"], event["client"]) for event in events(tmp_path / "run", "client")}
    assert took_part >= {(number, client) for number in (1, 2, 3) for client in (0, 2)} | {(2, 1), (3, 1)}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_site_that_allows_no_turns_at_a_larger_k_misses_these_and_the_run_goes_on(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    with trainers(site_files) as sites:
        engine = ThreadEngine(asking(sites), set(NAMES))
        shown = run_over(engine, a_hub(NAMES), tiny_folder, tmp_path / "run", "strategy.k_rotation=all")
    assert (
        "south refuses the rounds in which it would train with more than k = 2; ask for less "
        "(strategy.k_rotation = 'smaller'), or let its owner allow more (trainer.max_active_experts = 4)"
    ) in shown
    missed = {event["reason"] for event in events(tmp_path / "run", "excluded") if event["client"] == 1}
    assert missed == {"the site refuses: the plan asks for k = 4; this site allows at most 2"}
    assert {event["client"] for event in events(tmp_path / "run", "client")} == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_site_that_affords_less_than_it_is_given_is_left_out_and_the_run_is_that_of_the_others(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    south = site_files[1]
    south.write_text(south.read_text().replace("active_experts = 2", "active_experts = 1"))
    asked: list[str] = []
    with trainers(site_files) as sites:

        def noted(site: str, request: bytes) -> bytes:
            asked.append(f"{site} {Envelope.from_bytes(request).header['kind']}")
            return asking(sites)(site, request)

        shown = run_over(ThreadEngine(noted, set(NAMES)), a_hub(NAMES), tiny_folder, tmp_path / "run")
    reason = (
        "clients.active_experts gives it k = 2, its trainer affords 1; give it less, or let its owner allow "
        "more"
    )
    assert f"south is left out of all rounds: {reason}" in shown
    excluded = events(tmp_path / "run", "excluded")
    assert [(event["client"], event["reason"]) for event in excluded] == [(1, reason)] * 3
    assert {event["client"] for event in events(tmp_path / "run", "client")} == {0, 2}
    assert "south train" not in asked, "no plan is sent for nothing"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("method", "given", "advice"),
    [
        (
            ("strategy.name=flora",),
            "strategy.name = 'flora'",
            "choose a method that needs fewer, such as 'flame'",
        ),
        (
            ("strategy.name=fedavg", "strategy.active_experts=full"),
            "strategy.active_experts = 'full'",
            "choose fewer",
        ),
    ],
)
def test_sites_that_can_train_in_no_round_are_left_out_before_anything_is_trained(
    method: tuple[str, ...],
    given: str,
    advice: str,
    site_files: list[Path],
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    """Every client trains with K = 4; west's owner allows it, south's does not. Two may be too few."""
    asked: list[str] = []
    west = site_files[2]
    west.write_text(
        west.read_text().replace("active_experts = 1", "active_experts = 1\nmax_active_experts = 4")
    )
    reason = (
        f"{given} has every client train with k = 4, its trainer allows at most 2; {advice}, "
        "or let its owner allow more (trainer.max_active_experts = 4)"
    )
    with trainers(site_files) as sites:

        def noted(site: str, request: bytes) -> bytes:
            asked.append(f"{site} {Envelope.from_bytes(request).header['kind']}")
            return asking(sites)(site, request)

        engine = ThreadEngine(noted, set(NAMES))
        scored = ("server.fraction_evaluate=1", ONE_ROUND)
        with pytest.raises(UserError) as refused:
            three = "server.min_clients=3"
            run_over(engine, a_hub(NAMES), tiny_folder, tmp_path / "three", *method, *scored, three)
        assert str(refused.value) == (
            f"2 of 3 sites can take part; server.min_clients = 3 are needed. south cannot: {reason}"
        )
        assert sorted(asked) == [f"{name} describe" for name in sorted(NAMES)]
        two = "server.min_clients=2"
        shown = run_over(engine, a_hub(NAMES), tiny_folder, tmp_path / "run", *method, *scored, two)
    assert (
        f"south is left out of all rounds: {reason}" in shown and "south is not asked to score" not in shown
    )
    assert {event["client"] for event in events(tmp_path / "run", "client")} == {0, 2}
    assert [event["reason"] for event in events(tmp_path / "run", "excluded")] == [reason]
