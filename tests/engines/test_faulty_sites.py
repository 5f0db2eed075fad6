"""Sites that fail or say what they must not: the run goes on, says why, and equals one told to skip them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.altered_answers import Which, skip
from tests.engines.faulty_answers import (
    KINDS,
    LIES,
    altered,
    asked_for,
    claiming,
    failing_as,
    lying,
    reply,
    tokens_of_62_bits,
)
from tests.engines.sites_of_a_run import a_hub, make_sites, run_over
from tests.engines_here import ThreadEngine, asking, trainers
from tests.tiny_runs import adapter_bytes, events, state_bytes, tiny_run

from fedflame.engines.hub import Hub
from fedflame.engines.link import HubLink
from fedflame.errors import UserError
from fedflame.report import write_report
from fedflame.report.records import read_run
from fedflame.wire.envelope import Envelope

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("impatient")]
TWO = {"site-0": 2, "site-1": 1}
THREE = {"site-0": 4, "site-1": 2, "site-2": 1}


def hub_of(sites: Iterable[str]) -> Hub:
    """It waits for no site that has gone."""
    return a_hub(sites, rejoin_timeout=0, round_timeout=60)


def left_out(run: Path) -> dict[Which, str]:
    return {(event["round"], event["client"]): event["reason"] for event in events(run, "excluded")}


# At random


CLIENTS, ROUNDS, SHARE = 6, 25, 0.3


class Unreliable(ThreadEngine):
    """In a round, sites are not connected, and are back in the next."""

    gone: frozenset[Which]
    round = 0

    def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
        which = asked_for(content)
        self.round = which[0] if which else self.round
        if which in self.gone:
            link.failed(ticket, site, "not connected")
        else:
            super()._carry(link, sites, ticket, site, content)

    def connected(self) -> set[str]:
        return {site for site in self.reachable if (self.round, int(site[5:])) not in self.gone}


def test_with_thirty_percent_failing_at_random_many_rounds_equal_those_that_skip_them(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    every = itertools.product(range(1, ROUNDS + 1), range(CLIENTS))
    kinds = {which: rng.choice(list(KINDS)) for which in every if rng.random() < SHARE}
    assert min(Counter(kinds.values())[kind] for kind in KINDS) > 5, "every kind is tried"
    ks = {f"site-{client}": 2 - client % 2 for client in range(CLIENTS)}
    shape = (
        f"clients.num_clients={CLIENTS}",
        "clients.active_experts=2,1",
        "adapter.r=1",
        "adapter.target_modules=",
        "data.max_length=64",
        "training.max_steps=1",
        "training.per_device_train_batch_size=1",
        f"server.num_server_rounds={ROUNDS}",
        "evaluation.evaluate_every=0",
    )
    files = make_sites(tiny_folder, tmp_path, ks, *shape)
    with trainers(list(files.values())) as sites:
        engine = Unreliable(failing_as(kinds, asking(sites)), set(files))
        engine.gone = frozenset(which for which, kind in kinds.items() if kind == "gone")
        run_over(engine, hub_of(files), tiny_folder, tmp_path / "sites", *shape)
    found = left_out(tmp_path / "sites")
    assert found.keys() == kinds.keys()
    assert [which for which, kind in kinds.items() if KINDS[kind] not in found[which]] == []

    skip(monkeypatch, kinds)
    tiny_run(tiny_folder, tmp_path / "here", *shape)
    assert state_bytes(tmp_path / "sites") == state_bytes(tmp_path / "here")
    assert adapter_bytes(tmp_path / "sites") == adapter_bytes(tmp_path / "here")


# What a site must not say


def test_an_update_that_must_not_be_used_is_left_out_and_said_and_changes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (
        "clients.num_clients=2",
        "clients.active_experts=2,1",
        "training.max_steps=1",
        "evaluation.evaluate_every=0",
        f"server.num_server_rounds={max(LIES)[0] + 1}",
    )
    files = make_sites(tiny_folder, tmp_path, TWO, *shape)
    with trainers(list(files.values())) as sites:
        engine = ThreadEngine(lying(asking(sites), {}), set(files))
        shown = run_over(engine, hub_of(files), tiny_folder, tmp_path / "sites", *shape)
    found = left_out(tmp_path / "sites")
    assert found.keys() == LIES.keys()
    for (number, client), (_, reason) in LIES.items():
        assert reason in found[number, client]
        assert f"round {number}: {list(files)[client]} is left out: {found[number, client]}" in shown

    skip(monkeypatch, LIES)
    tiny_run(tiny_folder, tmp_path / "here", *shape)
    assert state_bytes(tmp_path / "sites") == state_bytes(tmp_path / "here")


# Too few


def test_without_a_quorum_the_run_ends_and_goes_on_when_sites_are_back(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = ("clients.num_clients=3", "server.min_clients=2", "server.num_server_rounds=3")
    files = make_sites(tiny_folder, tmp_path, THREE, *shape)
    with trainers(list(files.values())) as sites:
        lost: dict[Which, str] = {(2, 0): "fails", (2, 2): "garbage"}
        engine = ThreadEngine(failing_as(lost, asking(sites)), set(files))
        with pytest.raises(UserError) as ended:
            run_over(engine, hub_of(files), tiny_folder, tmp_path / "sites", *shape)
        assert str(ended.value) == (
            "round 2: 1 usable updates; server.min_clients = 2 are needed. "
            "The checkpoint of the round before is kept; --resume tries this round again"
        )
        engine = ThreadEngine(asking(sites), set(files))
        run_over(engine, hub_of(files), tiny_folder, tmp_path / "sites", *shape, existing="resume")
    tiny_run(tiny_folder, tmp_path / "here", *shape)
    assert state_bytes(tmp_path / "sites") == state_bytes(tmp_path / "here")
    assert not events(tmp_path / "sites", "excluded"), "what was logged of the round is tried again, too"


def test_a_site_that_answers_nonsense_ends_a_run_without_the_others_in_a_line_also_when_it_is_resumed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = (
        "clients.num_clients=2",
        "clients.active_experts=2,1",
        "server.min_clients=2",
        "server.num_server_rounds=2",
        "training.max_steps=1",
    )
    files = make_sites(tiny_folder, tmp_path, TWO, *shape)
    with trainers(list(files.values())) as sites:
        honest = asking(sites)

        def nonsense(site: str, request: bytes) -> bytes:
            answer, which = honest(site, request), asked_for(request)
            if site == "site-0" or which == (1, 1):
                return answer
            if which is None:
                return reply(request, b"", kind="description", num_examples="7")
            return reply(request, altered(bytes(Envelope.from_bytes(answer).body), tokens_of_62_bits))

        for existing in ("refuse", "resume"):
            engine = ThreadEngine(nonsense, set(files))
            with pytest.raises(UserError, match="round 2: 1 usable updates"):
                run_over(engine, hub_of(files), tiny_folder, tmp_path / "sites", *shape, existing=existing)
        engine = ThreadEngine(honest, set(files))
        run_over(engine, hub_of(files), tiny_folder, tmp_path / "sites", *shape, existing="resume")
    tiny_run(tiny_folder, tmp_path / "here", *shape)
    assert state_bytes(tmp_path / "sites") == state_bytes(tmp_path / "here")


def test_a_site_that_claims_rows_without_end_weighs_as_ten_of_the_median_and_this_is_said(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = ("strategy.counted_rows=held", "training.max_steps=1", "server.num_server_rounds=1")
    files = make_sites(tiny_folder, tmp_path, THREE, *shape)
    shown, claims = "", [2**40]
    with trainers(list(files.values())) as sites:
        for run in ("without-end", "ten"):
            engine = ThreadEngine(claiming(claims[-1], asking(sites), "site-2"), set(files))
            shown += run_over(engine, hub_of(files), tiny_folder, tmp_path / run, *shape)
            rows = {event["client"]: event["num_examples"] for event in events(tmp_path / run, "client")}
            assert rows[2] == claims[-1], "what is claimed is logged"
            claims.append(10 * max(rows[0], rows[1]))
    assert state_bytes(tmp_path / "without-end") == state_bytes(tmp_path / "ten")
    said = f"site-2 claims {2**40:,} rows; it weighs as {claims[1]:,}, 10 times the median"
    assert shown.count(said) == 1 and shown.count("10 times the median") == 1


def test_sites_that_withhold_their_loss_are_shown_without_one_and_no_figure_is_made_up(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = ("training.max_steps=1", "server.num_server_rounds=2")
    files = make_sites(tiny_folder, tmp_path, THREE, *shape)
    for name, disclosure in (("site-1", "rounded"), ("site-2", "withheld")):
        files[name].write_text(files[name].read_text() + f'[limits]\ndisclosure = "{disclosure}"\n')
    with trainers(list(files.values())) as sites:
        engine = ThreadEngine(asking(sites), set(files))
        shown = run_over(engine, hub_of(files), tiny_folder, tmp_path / "sites", *shape)
    updates = events(tmp_path / "sites", "client")
    losses = {event["client"]: event["loss"] for event in updates}
    assert losses[2] is None and losses[1] == round(losses[1], 1) and losses[0] != round(losses[0], 1)
    assert [event["counts"] == [] for event in updates] == [False, False, True] * 2
    assert "site-2 (k=1) loss withheld, " in shown
    record = read_run(tmp_path / "sites")
    sections = write_report(tmp_path / "sites").read_text().split("<section")
    (page,) = [part for part in sections if "Excluded" in part]
    told = [update for update in record.updates if update.round == 1 and update.loss is not None]
    mean = sum((update.loss or 0) * update.tokens for update in told) / sum(update.tokens for update in told)
    assert len(told) == 2 and f"{mean:.3f}" in page
