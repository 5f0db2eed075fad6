"""Sites score the global model where their rows are: the figures of one process, whatever happens between."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engines.sites_of_a_run import KS, NAMES, a_hub, make_sites, run_over
from tests.engines_here import Deliver, ThreadEngine, asking, trainers
from tests.same_runs import sums, tiers
from tests.tiny_runs import ANSWERS, events, state_bytes

from fedflame.engines.link import HubLink
from fedflame.errors import UserError
from fedflame.trainer.ask import answer_pieces
from fedflame.wire.codec import EVALUATION_LIMIT, decode_evaluation, encode_evaluation
from fedflame.wire.envelope import Envelope

ASKED = ("server.fraction_evaluate=1", "evaluation.client_test_size=0.3", "data.max_rows=60", ANSWERS)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def finished(undisturbed: Callable[..., Path]) -> Path:
    return undisturbed(*ASKED)


@pytest.fixture
def site_files(tiny_folder: Path, tmp_path: Path) -> list[Path]:
    """Rows to train on and rows to score, as `fedflame split` gives them to each site."""
    paths = list(make_sites(tiny_folder, tmp_path, KS, *ASKED).values())
    for client, path in enumerate(paths):
        test = tmp_path / "silos" / "test" / f"client-{client}.jsonl"
        path.write_text(path.read_text().replace("[data]\n", f'[data]\ntest_dataset_name = "{test}"\n'))
    return paths


def test_three_sites_tell_the_sums_of_one_process(
    finished: Path, site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    asked = Counter[str]()
    with trainers(site_files) as sites:

        def noted(site: str, request: bytes) -> bytes:
            asked[Envelope.from_bytes(request).header["kind"]] += 1
            return asking(sites)(site, request)

        shown = run_over(ThreadEngine(noted, set(NAMES)), a_hub(NAMES), tiny_folder, tmp_path / "run", *ASKED)
    assert sums(tmp_path / "run") == sums(finished) and tiers(tmp_path / "run") == tiers(finished)
    assert state_bytes(tmp_path / "run") == state_bytes(finished)
    assert asked == {"describe": 3, "evaluate": 12, "train": 9}, "a round before training, and three"
    assert "round 3: rows of clients at k=2: loss " in shown and "round 3: rows of all clients: loss" in shown
    assert "(1 client, " in shown and "(3 clients, " in shown


def test_a_plan_whose_adapter_was_scored_is_not_sent_again(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    """Without turns at another k, a site trains what it has just scored."""
    same = "strategy.k_rotation=none"
    with trainers(site_files) as sites:
        run_over(
            ThreadEngine(asking(sites), set(NAMES)), a_hub(NAMES), tiny_folder, tmp_path / "run", *ASKED, same
        )
    scored = {
        (e["round"], e["client"]): e["bytes_down"] for e in events(tmp_path / "run", "client_evaluation")
    }
    trained = {(e["round"], e["client"]): e["bytes_down"] for e in events(tmp_path / "run", "client")}
    adapter = scored[0, 0]
    for place, size in trained.items():
        assert size < 0.1 * adapter < adapter <= scored[place] + 4000, place


def test_a_site_that_scores_nothing_is_not_asked_and_this_is_said(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    south = site_files[1]
    south.write_text(south.read_text() + '[limits]\ndisclosure = "withheld"\n')
    with trainers(site_files) as sites:
        run = tmp_path / "run"
        shown = run_over(ThreadEngine(asking(sites), set(NAMES)), a_hub(NAMES), tiny_folder, run, *ASKED)
    assert "south is not asked to score: its file holds out no rows for it" in shown
    assert {event["client"] for event in events(run, "client_evaluation")} == {0, 2}
    assert not events(run, "evaluation_excluded") and len(events(run, "client")) == 9
    assert {event["clients"] for event in tiers(run) if event["active_experts"] is None} == {2}
    clients = json.loads((run / "partition.json").read_text())["clients"]
    told = [client["test_rows"] for client in clients]
    assert told[1] == 0 and all(told[::2])


def misbehaving(sites: Any, answer: Any) -> Deliver:
    """South answers an evaluation as it is told; else it is honest."""

    def deliver(site: str, request: bytes) -> bytes:
        given = b"".join(answer_pieces(sites[site].socket_path, [request], patience=5.0))
        kind = Envelope.from_bytes(request).header["kind"]
        return answer(Envelope.from_bytes(given)) if (site, kind) == ("south", "evaluate") else given

    return deliver


def falsified(given: Envelope, **changes: Any) -> bytes:
    body = encode_evaluation(replace(decode_evaluation(given.body), **changes))
    return Envelope(given.header, body).to_bytes()


# fmt: off
FALSE: list[tuple[Callable[[Envelope], bytes], str]] = [
    (lambda given: falsified(given, loss_sum=float("nan")), "evaluation has loss_sum = nan; 0 to "),
    (lambda given: falsified(given, loss_sum=-1.0), "evaluation has loss_sum = -1.0; 0 to "),
    (lambda given: falsified(given, rows=10**6), "evaluation has rows = 1000000; 1 to "),
    (lambda given: falsified(given, response_tokens=2**62), "evaluation has response_tokens = 46116860"),
    (lambda given: falsified(given, rows=True), "rows is of type bool; int is needed"),
    (lambda given: falsified(given, round=7), "evaluation is for round 7; "),
    (lambda given: Envelope(given.header, b"nothing").to_bytes(), "7 bytes that are no fedflame message"),
    (lambda given: Envelope(given.header | {"kind": "update"}, given.body).to_bytes(),
     "its answer is refused: it is of kind 'update'"),
    (lambda given: Envelope(given.header, bytes(EVALUATION_LIMIT + (1 << 20))).to_bytes(),
     "an answer to this request has at most"),
    (lambda given: Envelope(given.header | {"kind": "refused", "reason": "not\ntoday"}, b"").to_bytes(),
     "the site refuses: not today"),
]
# fmt: on


def test_a_false_evaluation_of_a_site_is_left_out_and_the_run_goes_on(
    finished: Path, site_files: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    """Another false one after each round."""
    left = iter([answer for answer, _ in FALSE])
    rounds = (f"server.num_server_rounds={len(FALSE) - 1}", "training.max_steps=1")
    with trainers(site_files) as sites:
        engine = ThreadEngine(misbehaving(sites, lambda given: next(left)(given)), set(NAMES))
        run_over(engine, a_hub(NAMES), tiny_folder, tmp_path / "run", *ASKED, *rounds)
    excluded = events(tmp_path / "run", "evaluation_excluded")
    assert [(event["round"], event["client"]) for event in excluded] == [(at, 1) for at in range(len(FALSE))]
    for event, (_, reason) in zip(excluded, FALSE, strict=True):
        assert reason in event["reason"]
    honest = [told for told in sums(finished) if told[0] == 0 and told[1] != 1]
    assert sums(tmp_path / "run")[:2] == honest
    assert [event["clients"] for event in tiers(tmp_path / "run")] == [1, 1, 2] * len(FALSE)
    assert all(0 < event["loss"] < 100 for event in tiers(tmp_path / "run"))


class EndsInAnEvaluation(ThreadEngine):
    """The job ends, and with it the driver cannot start another, at the first evaluation after round 2."""

    broken = True

    def submit(self, hub_socket: Path, job_key: str) -> str:
        if self.jobs and self.broken:
            raise OSError("gone")
        return super().submit(hub_socket, job_key)


def test_a_run_that_ends_in_an_evaluation_is_resumed_without_scoring_twice(
    finished: Path, site_files: list[Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.BACKOFF_SECONDS", 0.01)
    scored = Counter[tuple[str, int]]()
    with trainers(site_files) as sites:
        engines: list[EndsInAnEvaluation] = []

        def ends(site: str, request: bytes) -> bytes:
            header = Envelope.from_bytes(request).header
            given = asking(sites)(site, request)
            if header["kind"] == "evaluate" and Envelope.from_bytes(given).header["kind"] == "evaluation":
                told = decode_evaluation(Envelope.from_bytes(given).body)
                scored[site, told.round] += 1
                if told.round == 2 and engines[0].broken:
                    engines[0].end("job-1", "crashed")
            return given

        engines.append(EndsInAnEvaluation(ends, set(NAMES)))
        with pytest.raises(UserError, match="--resume goes on"):
            run_over(engines[0], a_hub(NAMES, max_resubmissions=1), tiny_folder, tmp_path / "run", *ASKED)
        engines[0].broken = False
        run_over(engines[0], a_hub(NAMES), tiny_folder, tmp_path / "run", *ASKED, existing="resume")
        ledgers = [(site.state_path / "ledger.jsonl").read_text() for site in sites.values()]
    assert sums(tmp_path / "run") == sums(finished)
    assert state_bytes(tmp_path / "run") == state_bytes(finished)
    assert [ledger.count('"evaluate"') for ledger in ledgers] == [4, 4, 4], "asked again, and scored once"
    assert max(scored.values()) > 1


class WestLeaves(ThreadEngine):
    """It is gone from when it is first asked to score."""

    def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
        if (site, Envelope.from_bytes(content).header["kind"]) == ("west", "evaluate"):
            self.reachable.discard("west")
        super()._carry(link, sites, ticket, site, content)


def test_a_site_that_is_lost_in_an_evaluation_is_left_out_of_it(
    site_files: list[Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.REJOIN_POLL_SECONDS", 0.02)
    monkeypatch.setattr("fedflame.engines.clients.POLL_SECONDS", 0.02)
    one = (*ASKED, "server.num_server_rounds=1")
    with trainers(site_files) as sites:
        engine = WestLeaves(asking(sites), set(NAMES))
        run_over(engine, a_hub(NAMES, rejoin_timeout=0.1), tiny_folder, tmp_path / "run", *one)
    assert {event["client"] for event in events(tmp_path / "run", "client_evaluation")} == {0, 1}
    excluded = events(tmp_path / "run", "evaluation_excluded")
    assert [(e["round"], e["client"], e["reason"]) for e in excluded] == [
        (number, 2, "not connected") for number in (0, 1)
    ]
    assert [event["client"] for event in events(tmp_path / "run", "client")] == [0, 1]
