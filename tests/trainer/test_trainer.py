"""The resident trainer: that it trains a plan once, what it keeps of it, and what it says of itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.engines_here import write_site
from tests.tiny_models import TOP_K
from tests.trainer_asked import MODEL, ROWS, RUN, Told, request

from fedflame.base.adapted import load_adapted_model
from fedflame.base.files import model_digest
from fedflame.data.encoder import new_encoder, pad_token
from fedflame.data.encoding import encode, encode_rows
from fedflame.data.rows import load_rows
from fedflame.errors import UserError
from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site
from fedflame.training.fine_tune import fine_tune
from fedflame.wire.addition import encode_addition, plan_digest
from fedflame.wire.codec import decode_update, encode_plan, encode_update
from fedflame.wire.envelope import Envelope


@pytest.mark.parametrize("changes", [{}, {"packed_length": 32}, {"padding_free": True}], ids=str)
def test_its_update_is_that_of_training_the_same_rows_here(
    changes: dict[str, Any],
    make_service: Callable[..., TrainerService],
    job: TrainingJob,
    plan: RoundPlan,
    data: Path,
    tiny_folder: Path,
) -> None:
    plan = replace(plan, **changes)
    answer = make_service().answer(request(job, plan))
    adapted, tokenizer = load_adapted_model(str(tiny_folder), "float32", job.adapter)
    encoder = new_encoder(tokenizer, job.max_length)
    rows = [encode(row, encoder) for row in load_rows(dataset_name=str(data)).rows]
    expected = fine_tune(adapted, rows, plan, pad_token(tokenizer))
    assert answer.body == encode_update(expected, plan)
    assert answer.header == {
        "kind": "update", "ticket": "t1", "run": RUN, "site": "north", "steps": 3, "tokens": expected.tokens,
    }  # fmt: skip


def test_asked_again_it_answers_again_without_training_also_after_its_own_end(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service = make_service()
    first = service.answer(request(job, plan))
    again = service.answer(request(job, plan, ticket="t2"))
    restarted = make_service().answer(request(job, plan, ticket="t3"))
    assert first.body == again.body == restarted.body
    assert [answer.header["ticket"] for answer in (first, again, restarted)] == ["t1", "t2", "t3"]
    assert (told.heard("training with k=2"), told.heard("answered again")) == (1, 2)


def test_another_run_or_plan_is_trained_anew_and_an_older_one_gives_the_same_bytes(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service = make_service()
    first = service.answer(request(job, plan))
    other_run = service.answer(request(job, plan, run="cd" * 16))
    next_round = service.answer(request(job, replace(plan, round=3)))
    older = service.answer(request(job, plan))
    assert told.heard("trained in") == 4
    assert first.body == other_run.body == older.body != next_round.body


@pytest.mark.parametrize("at", [3, -3])
def test_an_answer_that_was_damaged_on_its_disk_is_trained_again(
    at: int,
    make_service: Callable[..., TrainerService],
    job: TrainingJob,
    plan: RoundPlan,
    told: Told,
    tmp_path: Path,
) -> None:
    service = make_service()
    first = service.answer(request(job, plan))
    kept = tmp_path / "state" / RUN / "answer"
    content = bytearray(kept.read_bytes())
    content[at] ^= 1
    kept.write_bytes(content)
    again = service.answer(request(job, plan))
    assert again.body == first.body and told.heard("trained in") == 2
    assert service.answer(request(job, plan)).body == first.body and told.heard("trained in") == 2


def test_asked_twice_at_once_it_trains_once(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told
) -> None:
    service, answers = make_service(), list[bytes]()
    threads = [
        threading.Thread(target=lambda: answers.append(service.answer(request(job, plan)).body))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1 and len(answers) == 3
    assert told.heard("trained in") == 1


def test_rounded_updates_owe_per_run(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    lossy = replace(plan, update_dtype="int8", error_feedback=True)
    answer = make_service().answer(request(job, lossy))
    assert answer.header["kind"] == "update"
    assert (tmp_path / "state" / RUN / "residuals" / "1" / "2.sealed").is_file()


def test_it_describes_itself_and_nothing_else(
    make_service: Callable[..., TrainerService], job: TrainingJob
) -> None:
    answer = make_service(k=2).answer(
        Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"})
    )
    expected: dict[str, Any] = {"kind": "description", "ticket": "t", "run": RUN, "site": "north"}
    expected |= {"num_examples": ROWS, "active_experts": 2, "max_active_experts": 2, "test_rows": 0}
    assert answer == Envelope(expected | {"held": ""})


def test_it_takes_what_a_plan_adds_to_the_one_it_answered_last_also_after_its_own_end(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan
) -> None:
    held = encode_plan(plan)
    make_service().answer(request(job, plan))
    service, following = make_service(), replace(plan, round=3)
    described = service.answer(Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"}))
    assert described.header["held"] == plan_digest(held)
    asked = request(job, plan, addition=True)
    added = service.answer(Envelope(asked.header, encode_addition(encode_plan(following), held)))
    assert added.body == make_service().answer(request(job, following, run="cd" * 16)).body


def test_what_adds_to_a_plan_that_it_has_not_is_said_to_be_lacking(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    held = encode_plan(plan)
    addition = encode_addition(encode_plan(replace(plan, round=3)), held)
    asked = Envelope(request(job, plan, addition=True).header, addition)
    assert make_service().answer(asked).header["kind"] == "lacking"
    service = make_service()
    service.answer(request(job, plan))
    kept = tmp_path / "state" / RUN / "plan"
    kept.write_bytes(kept.read_bytes()[:-1])  # the disk was full, or the machine lost power
    answer = service.answer(asked)
    assert answer.header["kind"] == "lacking" and not answer.body
    kept.unlink()
    kept.mkdir()  # nothing can be written there
    assert service.answer(request(job, replace(plan, round=4))).header["kind"] == "update"


def test_of_many_runs_the_states_of_the_last_are_kept(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path, told: Told
) -> None:
    service = make_service(k=TOP_K)
    site = service._site
    service._site = site.model_copy(update={"trainer": site.trainer.model_copy(update={"kept_runs": 2})})
    state, runs = tmp_path / "state", [letter * 32 for letter in "abc"]
    (state / "mine").mkdir(parents=True)
    first = service.answer(request(job, plan, run=runs[0]))
    for run in (runs[1], runs[0], runs[2]):
        service.answer(request(job, replace(plan, round=3), run=run))
    assert {path.name for path in state.iterdir() if path.is_dir()} == {"mine", runs[0], runs[2]}
    assert told.heard(f"run {runs[1][:8]}: its state is removed (trainer.kept_runs)") == 1
    assert told.heard("its state is removed") == 1
    assert service.answer(request(job, plan, run=runs[1])).body == first.body, "it trains again"


def test_of_few_runs_all_states_are_kept(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, tmp_path: Path
) -> None:
    """Half as many as may be kept, and one more."""
    others = {f"{number:032x}" for number in range(6)}
    for name in others:
        (tmp_path / "state" / name).mkdir(parents=True)
    make_service().answer(request(job, plan))
    assert {path.name for path in (tmp_path / "state").iterdir() if path.is_dir()} == others | {RUN}


def test_a_model_is_loaded_once_for_a_job_and_goes_before_the_next_is_loaded(
    make_service: Callable[..., TrainerService], job: TrainingJob, plan: RoundPlan, told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    service, digests, held = make_service(), list[str](), list[bool]()

    def noted_digest(path: str) -> str:
        digests.append(path)
        return model_digest(path)

    def noted_load(*arguments: Any) -> Any:
        held.append(service._work._model.ready is not None)
        return load_adapted_model(*arguments)

    monkeypatch.setattr("fedflame.trainer.model.model_digest", noted_digest)
    monkeypatch.setattr("fedflame.trainer.model.load_adapted_model", noted_load)
    smaller = job.model_copy(update={"r": 2}), replace(plan, adapter=plan.adapter.with_rank(2))
    for asked, its in ((job, plan), (job, replace(plan, round=3)), smaller):
        assert service.answer(request(asked, its)).header["kind"] == "update"
    assert told.heard("loading the-model in float32") == 2 and held == [False, False]
    assert len(digests) == 1, "gigabytes are read once"


def test_a_file_without_a_usable_row_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say nothing", "response": ""}\n')
    site = load_site(write_site(tmp_path, "north", tmp_path / "rows.jsonl", 2, {MODEL: str(tiny_folder)}))
    with pytest.raises(UserError, match=r"rows\.jsonl: no usable row"):
        TrainerService(site, lambda _: None)


def test_a_row_that_cannot_be_encoded_is_still_a_row_of_the_site(
    make_service: Callable[..., TrainerService],
    job: TrainingJob,
    plan: RoundPlan,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub leaves out an update that claims another number of rows than the site has described."""
    monkeypatch.setattr(
        "fedflame.trainer.model.encode_rows",
        lambda rows, encoder: ["row 1: no", *encode_rows(rows[1:], encoder)],
    )
    service = make_service()
    update = decode_update(service.answer(request(job, plan)).body, plan)
    assert told.heard("1 of 7 rows cannot be used; the first: row 1: no")
    described = service.answer(Envelope({"kind": "describe", "ticket": "t", "run": RUN, "site": "north"}))
    assert update.num_examples == described.header["num_examples"] == ROWS
    assert update.trained_examples == 6
