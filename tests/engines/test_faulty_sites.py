"""Sites that fail or say what they must not: the run goes on, says why, and equals one told to skip them."""

from __future__ import annotations

import io
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.engines_here import Deliver, ThreadEngine, asking, trainers, write_site
from tests.tiny_runs import SETTINGS, adapter_bytes, events, invoke, state_bytes, tiny_config, tiny_run
from torch import Tensor

from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients
from fedflame.commands.run import print_run
from fedflame.engines.hub import Hub, HubRounds
from fedflame.engines.link import HubLink
from fedflame.errors import UserError
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run_folder import Existing
from fedflame.experiment.sites import Sites
from fedflame.report import write_report
from fedflame.report.records import read_run
from fedflame.wire.buffer import pack, unpack
from fedflame.wire.codec import decode_plan
from fedflame.wire.envelope import Envelope
from fedflame.wire.frame import seal, unseal
from fedflame.wire.planes import compress, decompress

pytestmark = pytest.mark.slow

Which = tuple[int, int]
"""Round and client."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.engines.clients.POLL_SECONDS", 0.02)
    monkeypatch.setattr("fedflame.engines.jobs.POLL_SECONDS", 0.02)


def asked_for(request: bytes) -> Which | None:
    """What a request is about; None if it is no plan."""
    envelope = Envelope.from_bytes(request)
    if envelope.header["kind"] != "train":
        return None
    _, header = unpack(unseal(bytes(envelope.body)))
    plan = header.get("header", header)  # of an addition, that of the plan that it makes
    return plan["round"], plan["client"]


def skipping(monkeypatch: pytest.MonkeyPatch, skipped: Iterable[Which]) -> None:
    """Clients of one process give no answer for these rounds."""
    known, answer = frozenset(skipped), LocalClients.answer

    def told_to_skip(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        asked = decode_plan(plan)
        skip = (asked.round, asked.client) in known
        return Answer(b"", "told to skip", 0.0) if skip else answer(self, plan, on_step)

    monkeypatch.setattr(LocalClients, "answer", told_to_skip)


def make_sites(model: Path, folder: Path, ks: Iterable[int], *overrides: str) -> dict[str, Path]:
    """Sites with the rows of each client of the run, in client order."""
    settings = [part for setting in (*SETTINGS, *overrides) for part in ("--set", setting)]
    told = invoke("split", "--output-dir", folder / "silos", "--model", model, *settings)
    assert told.exit_code == 0, told.output
    return {
        f"site-{client}": write_site(
            folder / f"site-{client}", f"site-{client}", folder / "silos" / f"client-{client}.jsonl", k,
            {str(model): str(model)},
        )
        for client, k in enumerate(ks)
    }  # fmt: skip


def run_over(
    engine: ThreadEngine, model: Path, run: Path, *overrides: str, existing: Existing = "refuse"
) -> str:
    hub = Hub(sites=tuple(sorted(engine.reachable)), rounds=HubRounds(rejoin_timeout=0, round_timeout=60))
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    print_run(prepare(tiny_config(model, run, *overrides), existing, Sites(hub, engine)), "", console)
    return shown.getvalue()


def reply(request: bytes, body: bytes, **changes: str) -> bytes:
    """An answer to just this request, whatever its body is."""
    asked = Envelope.from_bytes(request).header
    header = {name: asked[name] for name in ("ticket", "run", "site")}
    return Envelope(header | {"kind": "update", "steps": 1, "tokens": 1} | changes, body).to_bytes()


def flipped(content: bytes) -> bytes:
    """With one bit changed."""
    return content[:-1] + bytes([content[-1] ^ 1])


def left_out(run: Path) -> dict[Which, str]:
    return {(event["round"], event["client"]): event["reason"] for event in events(run, "excluded")}


# At random


CLIENTS, ROUNDS, SHARE = 6, 25, 0.3
KINDS = {
    "fails": "RuntimeError: out of memory",
    "garbage": "its answer is refused: 7 bytes that are no envelope",
    "damaged": "its checksum is wrong",
    "repeats": "its answer is refused: its ticket is not the one that was asked for",
    "gone": "not connected",
}


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


def failing_as(kinds: dict[Which, str], deliver: Deliver) -> Deliver:
    """Sites that answer as the kind of failure says, and honestly in all other rounds."""
    last: dict[str, bytes] = {}

    def answer(site: str, request: bytes) -> bytes:
        kind = kinds.get(asked_for(request) or (0, 0))
        if kind == "garbage":
            return b"garbage"
        if kind == "repeats":
            return last[site]
        if kind == "fails":
            return reply(request, b"", kind="failed", reason=KINDS["fails"])
        last[site] = deliver(site, request)
        return flipped(last[site]) if kind == "damaged" else last[site]

    return answer


def test_with_thirty_percent_failing_at_random_many_rounds_equal_those_that_skip_them(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(1)
    every = itertools.product(range(1, ROUNDS + 1), range(CLIENTS))
    kinds = {which: rng.choice(list(KINDS)) for which in every if rng.random() < SHARE}
    assert min(Counter(kinds.values())[kind] for kind in KINDS) > 5, "every kind is tried"
    ks = [2, 1] * (CLIENTS // 2)
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
        run_over(engine, tiny_folder, tmp_path / "sites", *shape)
    found = left_out(tmp_path / "sites")
    assert found.keys() == kinds.keys()
    assert [which for which, kind in kinds.items() if KINDS[kind] not in found[which]] == []

    skipping(monkeypatch, kinds)
    tiny_run(tiny_folder, tmp_path / "here", *shape)
    assert state_bytes(tmp_path / "sites") == state_bytes(tmp_path / "here")
    assert adapter_bytes(tmp_path / "sites") == adapter_bytes(tmp_path / "here")


# What a site must not say


def altered(update: bytes, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> bytes:
    """The sealed update with other values or fields, under a seal that is right."""
    tensors, header = unpack(decompress(unseal(update), 1 << 30))
    change(tensors, header)
    return seal(compress(pack(tensors, header)))


def of_client_0(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["client"] = 0


def not_finite(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["experts.0.B2"].fill_(float("nan"))


def more_counts_than_tokens(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["counts"] += 10**6


def more_rows(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["num_examples"] = 10**6


def tokens_of_62_bits(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["tokens"] = 2**62


def tokens_as_text(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["tokens"] = str(header["tokens"])


def rows_as_truth(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["num_examples"] = True


def fewer_counts(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["counts"][tensors["counts"] > 1] -= 1


def escape_codes(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["\x1b[2J\ud800\nred"] = 0


Forge = Callable[[bytes, dict[Which, bytes]], bytes]
"""From an honest update, and all that sites have said so far, to another one."""
LIES: dict[Which, tuple[Forge, str]] = {
    (3, 1): (lambda update, said: said[1, 1], "update is for round 1; 3 was asked for"),
    (4, 1): (
        lambda update, said: altered(update, of_client_0),
        "update is for client 0; 1 was asked for",
    ),
    (5, 1): (lambda update, said: flipped(update), "its checksum is wrong"),
    (6, 1): (lambda update, said: update + bytes(2 << 20), "an answer has at most"),
    (7, 1): (lambda update, said: altered(update, not_finite), "that is not finite"),
    (8, 1): (lambda update, said: altered(update, more_counts_than_tokens), "counts must lie between 0"),
    (9, 1): (lambda update, said: altered(update, more_rows), "update claims 1000000 rows; the client has"),
    (10, 1): (lambda update, said: said[1, -1], "not a fedflame update"),
    (11, 1): (lambda update, said: altered(update, tokens_of_62_bits), "1 steps of this plan have 1 to"),
    (12, 1): (lambda update, said: altered(update, tokens_as_text), "tokens is of type str"),
    (13, 1): (lambda update, said: altered(update, rows_as_truth), "num_examples is of type bool"),
    (14, 1): (lambda update, said: altered(update, fewer_counts), "each must sum to tokens x k"),
    (15, 1): (lambda update, said: altered(update, escape_codes), "or said twice: [2J red"),
    (16, 1): (lambda update, said: update + bytes(4 << 20), "an answer to this request has at most"),
}


def lying(sites: Deliver, said: dict[Which, bytes]) -> Deliver:
    """Sites whose answers are right but for the updates in `LIES`."""

    def answer(site: str, request: bytes) -> bytes:
        honest, which = sites(site, request), asked_for(request)
        if which is None:
            return honest
        update = said[which] = bytes(Envelope.from_bytes(honest).body)
        said[which[0], -1] = bytes(Envelope.from_bytes(request).body)
        return reply(request, LIES[which][0](update, said)) if which in LIES else honest

    return answer


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
    files = make_sites(tiny_folder, tmp_path, [2, 1], *shape)
    with trainers(list(files.values())) as sites:
        engine = ThreadEngine(lying(asking(sites), {}), set(files))
        shown = run_over(engine, tiny_folder, tmp_path / "sites", *shape)
    found = left_out(tmp_path / "sites")
    assert found.keys() == LIES.keys()
    for (number, client), (_, reason) in LIES.items():
        assert reason in found[number, client]
        assert f"round {number}: {list(files)[client]} is left out: {found[number, client]}" in shown

    skipping(monkeypatch, LIES)
    tiny_run(tiny_folder, tmp_path / "here", *shape)
    assert state_bytes(tmp_path / "sites") == state_bytes(tmp_path / "here")


# Too few


def test_without_a_quorum_the_run_ends_and_goes_on_when_sites_are_back(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = ("clients.num_clients=3", "server.min_clients=2", "server.num_server_rounds=3")
    files = make_sites(tiny_folder, tmp_path, [4, 2, 1], *shape)
    with trainers(list(files.values())) as sites:
        lost: dict[Which, str] = {(2, 0): "fails", (2, 2): "garbage"}
        engine = ThreadEngine(failing_as(lost, asking(sites)), set(files))
        with pytest.raises(UserError) as ended:
            run_over(engine, tiny_folder, tmp_path / "sites", *shape)
        assert str(ended.value) == (
            "round 2: 1 usable updates; server.min_clients = 2 are needed. "
            "The checkpoint of the round before is kept; --resume tries this round again"
        )
        engine = ThreadEngine(asking(sites), set(files))
        run_over(engine, tiny_folder, tmp_path / "sites", *shape, existing="resume")
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
    files = make_sites(tiny_folder, tmp_path, [2, 1], *shape)
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
                run_over(engine, tiny_folder, tmp_path / "sites", *shape, existing=existing)
        engine = ThreadEngine(honest, set(files))
        run_over(engine, tiny_folder, tmp_path / "sites", *shape, existing="resume")
    tiny_run(tiny_folder, tmp_path / "here", *shape)
    assert state_bytes(tmp_path / "sites") == state_bytes(tmp_path / "here")


def claiming(rows: int, sites: Deliver, liar: str) -> Deliver:
    """Sites of which one says, in its description and in every update, that it holds so many rows."""

    def more(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["num_examples"] = rows

    def answer(site: str, request: bytes) -> bytes:
        honest = Envelope.from_bytes(sites(site, request))
        if site != liar:
            return honest.to_bytes()
        if asked_for(request) is None:
            return Envelope(honest.header | {"num_examples": rows}).to_bytes()
        return reply(request, altered(bytes(honest.body), more))

    return answer


def test_a_site_that_claims_rows_without_end_weighs_as_ten_of_the_median_and_this_is_said(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = ("strategy.counted_rows=held", "training.max_steps=1", "server.num_server_rounds=1")
    files = make_sites(tiny_folder, tmp_path, [4, 2, 1], *shape)
    shown, claims = "", [2**40]
    with trainers(list(files.values())) as sites:
        for run in ("without-end", "ten"):
            engine = ThreadEngine(claiming(claims[-1], asking(sites), "site-2"), set(files))
            shown += run_over(engine, tiny_folder, tmp_path / run, *shape)
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
    files = make_sites(tiny_folder, tmp_path, [4, 2, 1], *shape)
    for name, disclosure in (("site-1", "rounded"), ("site-2", "withheld")):
        files[name].write_text(files[name].read_text() + f'[limits]\ndisclosure = "{disclosure}"\n')
    with trainers(list(files.values())) as sites:
        engine = ThreadEngine(asking(sites), set(files))
        shown = run_over(engine, tiny_folder, tmp_path / "sites", *shape)
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
