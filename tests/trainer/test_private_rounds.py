"""Private rounds at a site: what they spend, what is refused, and what a crash cannot spend twice."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer_asked import ROWS, RUN, Make, Told, request

from fedflame import atomic_file
from fedflame.data.conversations import single_turn
from fedflame.errors import UserError
from fedflame.messages import RoundPlan
from fedflame.privacy.accounting import Spending, epsilon_of
from fedflame.trainer import private_rounds, service
from fedflame.trainer.budget import require_within_budget
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.ledger import FILE_NAME, Round, read_ledger
from fedflame.trainer.private_rounds import SECRET_FILE, release_key, site_noise
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.rows import units_of
from fedflame.trainer.site import SitePrivacy
from fedflame.wire.codec import decode_update
from fedflame.wire.envelope import Envelope


@pytest.fixture
def private(plan: RoundPlan) -> RoundPlan:
    return replace(plan, clip_norm=1.0, noise_multiplier=1.0, target_delta=1e-5, private_steps=15)


def ledger(tmp_path: Path) -> list[Round]:
    return read_ledger(tmp_path / "state" / FILE_NAME)


def test_a_private_round_tells_constants_and_stands_in_the_ledger(
    make_service: Make, job: TrainingJob, private: RoundPlan, tmp_path: Path
) -> None:
    answer = make_service().answer(request(job, private))
    assert answer.header["kind"] == "update", answer.header
    update = decode_update(answer.body, private)
    assert (update.loss, update.sampling_rate, update.noise_multiplier) == (None, 2 / ROWS, 1.0)
    assert len(set(update.counts.flatten().tolist())) <= 2
    (begun,) = ledger(tmp_path)
    assert (begun.sampling_rate, begun.noise_multiplier, begun.steps) == (2 / ROWS, 1.0, 3)
    assert begun.data.endswith("rows.jsonl")


def test_the_same_plan_after_a_crash_gives_the_same_bytes_and_is_charged_once(
    make_service: Make, job: TrainingJob, private: RoundPlan, tmp_path: Path
) -> None:
    first = make_service().answer(request(job, private)).body
    (tmp_path / "state" / RUN / "answer").unlink()
    assert make_service().answer(request(job, private)).body == first
    assert len(ledger(tmp_path)) == 1


def test_other_rows_have_other_noise_and_are_charged_again(
    make_service: Make, job: TrainingJob, private: RoundPlan, tmp_path: Path, data: Path
) -> None:
    """The difference of two answers with one noise would show the row that was added."""
    make_service().answer(request(job, private))
    (tmp_path / "state" / RUN / "answer").unlink()
    content = data.read_text()
    try:
        data.write_text(content.replace("add 0 and", "add 9 and"))
        make_service().answer(request(job, private))
    finally:
        data.write_text(content)
    one, other = ledger(tmp_path)
    assert one.plan != other.plan and one.data == other.data


@pytest.mark.parametrize(
    "what", ["versions", "plan", "rows", "persons", "device", "threads", "processor", "instructions"]
)
def test_all_by_which_sums_could_differ_is_in_the_key(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [single_turn("a", "", "b", "all")]
    before, plan, device, threads = release_key("p", rows, "cpu"), "p", "cpu", torch.get_num_threads()
    if what == "versions":
        monkeypatch.setattr(private_rounds, "version", lambda name: f"9 of {name}")
    if what == "processor":
        monkeypatch.setattr(private_rounds, "processor", lambda: "another")
    if what == "instructions":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    if what == "rows":
        rows = [single_turn("a", "", "c", "all")]
    if what == "persons":
        rows = [replace(rows[0], owner="x")]
    plan, device = ("q" if what == "plan" else plan), ("cuda:0" if what == "device" else device)
    try:
        torch.set_num_threads(threads + (what == "threads"))
        assert release_key(plan, rows, device) != before
    finally:
        torch.set_num_threads(threads)


def test_sums_that_come_out_otherwise_each_time_never_have_the_same_noise() -> None:
    """As on a card, where the order in which numbers are added is not fixed; a CPU repeats every bit."""
    rows = [single_turn("a", "", "b", "all")]
    assert release_key("p", rows, "cuda:0") != release_key("p", rows, "cuda:0")
    assert release_key("p", rows, "cpu") == release_key("p", rows, "cpu")


def test_the_ledger_is_written_before_a_step_is_taken(
    make_service: Make, job: TrainingJob, private: RoundPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> None:
        assert len(ledger(tmp_path)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("fedflame.trainer.work.fine_tune_privately", killed)
    with pytest.raises(KeyboardInterrupt):
        make_service().answer(request(job, private))


def refused(answer: Envelope) -> str:
    assert answer.header["kind"] == "refused", answer.header
    return str(answer.header["reason"])


def test_a_run_beyond_the_budget_of_the_site_is_refused_before_anything_is_loaded(
    make_service: Make, job: TrainingJob, private: RoundPlan, told: Told, tmp_path: Path
) -> None:
    run = epsilon_of([Spending(2 / ROWS, 1.0, 15)], 1e-5)
    settings = f"[privacy]\nmax_epsilon = {run * 0.99}\n"
    reason = refused(make_service(settings).answer(request(job, private)))
    assert f"would have spent epsilon = {run:.3g} (delta = 1e-05), 0 of it before" in reason
    assert not told.heard("loading") and not ledger(tmp_path)
    enough = f"[privacy]\nmax_epsilon = {run * 1.01}\n"
    assert make_service(enough).answer(request(job, private)).header["kind"] == "update"


def begun(steps: int, run: str = "a", data: str = "rows", noise: float = 1.0) -> Round:
    return Round(run, "p", 1e9, "train", data, 0.1, noise, steps)


def test_a_run_is_charged_whole_and_what_was_spent_on_the_same_rows_counts() -> None:
    both = epsilon_of([Spending(0.1, 1.0, 60), Spending(0.1, 2.0, 20)], 1e-5)
    before = [begun(30), begun(20, "b", noise=2.0), begun(500, "b", "others"), Round("a", "q", 1e9)]
    for limit, fits in ((both * 1.001, True), (both * 0.999, False)):
        privacy = SitePrivacy(max_epsilon=limit)
        if fits:
            require_within_budget(before, begun(10), 60, 7, privacy)
        else:
            with pytest.raises(Refusal, match="of it before; this site allows at most"):
                require_within_budget(before, begun(10), 60, 7, privacy)


def test_a_run_that_asks_for_more_than_it_said_is_charged_what_it_asks_for() -> None:
    asked = epsilon_of([Spending(0.1, 1.0, 40)], 1e-5)
    with pytest.raises(Refusal):
        require_within_budget([begun(30)], begun(10), 30, 7, SitePrivacy(max_epsilon=asked * 0.999))
    require_within_budget([begun(30)], begun(10), 30, 7, SitePrivacy(max_epsilon=asked * 1.001))


def test_a_delta_that_lets_whole_rows_leave_is_refused() -> None:
    with pytest.raises(Refusal, match="no smaller than one over 10 rows"):
        require_within_budget([], begun(1), 1, 10, SitePrivacy(max_epsilon=8, delta=0.1))


@pytest.mark.parametrize("asks", ["require = true", "max_epsilon = 500"])
def test_a_site_that_asks_for_privacy_trains_and_scores_nothing_without(
    asks: str, make_service: Make, job: TrainingJob, plan: RoundPlan, private: RoundPlan
) -> None:
    site = make_service(f"[privacy]\n{asks}\n")
    assert "asks for privacy of rows; set privacy.unit = 'row'" in refused(site.answer(request(job, plan)))
    assert site.test_rows == 0
    assert site.answer(request(job, private)).header["kind"] == "update"


def test_a_plan_that_would_tell_of_rows_fails_with_its_reason(
    make_service: Make, job: TrainingJob, private: RoundPlan
) -> None:
    answer = make_service().answer(request(job, replace(private, lora_dropout=0.5)))
    assert answer.header["reason"] == "a private plan with lora_dropout = 0.5; it must be 0"


def test_rows_of_a_person_are_one_unit() -> None:
    rows = [single_turn(str(n), "", "b", "all") for n in range(5)]
    assert units_of(rows) == [[0], [1], [2], [3], [4]]
    named = [replace(row, owner=owner) for row, owner in zip(rows, "abaab", strict=True)]
    assert units_of(named) == [[0, 2, 3], [1, 4]]


def test_a_site_that_names_persons_samples_them(
    make_service: Make, job: TrainingJob, private: RoundPlan, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = data.read_text()
    lines = [
        line.replace("{", f'{{"patient": "p{n % 3}", ', 1) for n, line in enumerate(content.splitlines(True))
    ]
    seen: list[int] = []
    drawn = private_rounds.Noise.sample
    monkeypatch.setattr(
        private_rounds.Noise,
        "sample",
        lambda self, count, *more: (seen.append(count), drawn(self, count, *more))[1],
    )
    try:
        data.write_text("".join(lines))
        site = make_service()
        with_persons = site._site.model_copy(
            update={"data": site._site.data.model_copy(update={"person_field": "patient"})}
        )
        answer = service.TrainerService(with_persons, print).answer(request(job, private))
    finally:
        data.write_text(content)
    update = decode_update(answer.body, private)
    assert set(seen) == {3} and update.num_examples == ROWS and update.sampling_rate == 2 / 3


def test_the_secret_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    draws = [site_noise(tmp_path / "state", "run", "key").normal((4,), 0, "A") for _ in range(2)]
    assert torch.equal(*draws)
    path = tmp_path / "state" / SECRET_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(path.read_bytes()) == 32
    assert os.listdir(tmp_path / "state") == [SECRET_FILE]
    other = site_noise(tmp_path / "other", "run", "key").normal((4,), 0, "A")
    assert not bool((other == draws[0]).any())


def test_the_name_of_the_secret_is_on_the_disk_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(atomic_file, "fsync_folder", synced.append)
    site_noise(tmp_path / "state", "run", "key")
    assert synced == [tmp_path / "state"]
    site_noise(tmp_path / "state", "run", "key")
    assert len(synced) == 1, "the secret is there"


def test_a_damaged_secret_is_one_line(tmp_path: Path) -> None:
    (tmp_path / SECRET_FILE).write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes; a secret has 32"):
        site_noise(tmp_path, "run", "key")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read or written"):
        site_noise(tmp_path / "file", "run", "key")


@pytest.mark.parametrize(
    "changes",
    [{"sampling_rate": 1.5}, {"sampling_rate": -0.1}, {"noise_multiplier": -1.0}, {"steps": -1}],
)
def test_a_ledger_with_impossible_spending_lets_nothing_be_trained(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / FILE_NAME
    good = begun(3)
    from fedflame.trainer import ledger as ledgers

    ledgers._append(path, good)
    assert read_ledger(path) == [good]
    ledgers._append(path, replace(good, **changes))
    with pytest.raises(UserError, match=r"line 2: no record of a round \(a number out of its range\)"):
        read_ledger(path)
