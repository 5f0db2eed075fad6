"""A site scores rows of its own for the hub, within what its file allows, and tells sums alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer_asked import MODEL, ROWS, RUN, Make, Told, request

from fedflame.base.adapted import load_adapted_model
from fedflame.data.client_tests import encode_tests, split_test
from fedflame.data.encoder import new_encoder
from fedflame.data.encoding import EncodedRow
from fedflame.data.rows import load_rows
from fedflame.errors import UserError
from fedflame.messages import ClientEvaluation, EvaluationPlan, RoundPlan
from fedflame.trainer.disclosure import disclosed_scores
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.journal import read_journal
from fedflame.trainer.ledger import FILE_NAME, read_ledger
from fedflame.trainer.limits import require_enough_scored
from fedflame.trainer.model import SiteModel
from fedflame.trainer.refusal import Refusal
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import SiteLimits, load_site
from fedflame.training.evaluation import evaluate
from fedflame.training.score_tests import rows_to_score
from fedflame.training.scores import total
from fedflame.wire.addition import decode_addition, encode_addition
from fedflame.wire.codec import decode_evaluation, encode_plan
from fedflame.wire.envelope import Envelope

SHARE = "test_size = 0.4"


@pytest.fixture
def make(make_service: Make, told: Told) -> Make:
    """A trainer whose file has these lines more, in `[data]` and at its end."""

    def changed(data: str = SHARE, more: str = "") -> TrainerService:
        path = make_service()._site.folder / "site.toml"
        path.write_text(path.read_text().replace("[data]\n", f"[data]\n{data}\n") + more)
        return TrainerService(load_site(path), told.append)

    return changed


@pytest.fixture(scope="module")
def evaluation(plan: RoundPlan) -> EvaluationPlan:
    adapter = plan.adapter.combine(plan.adapter, lambda one, _: one + 0.05)
    return EvaluationPlan(2, 1, 2, torch.tensor([0.5] * len(plan.rescaler_values)), adapter)


def ask(service: TrainerService, job: TrainingJob, plan: Any, **changes: Any) -> Envelope:
    return service.answer(request(job, plan, **{"kind": "evaluate"} | changes))


def refusal(service: TrainerService, job: TrainingJob, plan: Any) -> str:
    answer = ask(service, job, plan)
    assert answer.header["kind"] == "refused" and answer.body == b""
    return str(answer.header["reason"])


def described(service: TrainerService) -> dict[str, Any]:
    return service.answer(Envelope({"kind": "describe", "ticket": "", "run": RUN, "site": "north"})).header


def test_the_sums_are_those_of_the_rows_that_the_file_holds_out(
    make: Make, job: TrainingJob, evaluation: EvaluationPlan, data: Path, tiny_folder: Path
) -> None:
    service, rows = make(), load_rows(dataset_name=str(data)).rows
    trained, scored = split_test(rows, 0.4, 0)
    assert len(scored) > 1 and (service.num_examples, service.test_rows) == (len(trained), len(scored))
    assert described(service)["test_rows"] == len(scored) and described(service)["num_examples"] == len(
        trained
    )
    adapted, tokenizer = load_adapted_model(str(tiny_folder), "float32", job.adapter)
    encoder = new_encoder(tokenizer, job.max_length)
    tests, _ = encode_tests([rows[index] for index in scored], encoder, None, generate=True)
    held_out = replace(rows_to_score(tests, encoder), max_new_tokens=2)
    for new_tokens in (0, 2):
        answer = ask(service, job, replace(evaluation, max_new_tokens=new_tokens))
        assert answer.header["kind"] == "evaluation"
        values = evaluation.adapter, 2, evaluation.rescaler_values
        wanted = total(evaluate(adapted, held_out, *values, generate=new_tokens > 0))
        assert decode_evaluation(answer.body) == ClientEvaluation(
            2, 1, 2, len(scored), wanted.response_tokens, pytest.approx(wanted.loss_sum, rel=1e-6),  # type: ignore[arg-type]
            wanted.exact_matches, wanted.rouge_l_sum,
        )  # fmt: skip


def test_rows_of_a_file_of_their_own_are_scored_and_all_others_trained_on(
    make: Make, job: TrainingJob, evaluation: EvaluationPlan, tmp_path: Path
) -> None:
    lines = [json.dumps({"instruction": f"tell {n}", "output": str(n)}) for n in range(3)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    service = make('test_dataset_name = "own.jsonl"')
    assert (service.num_examples, service.test_rows) == (ROWS, 3)
    assert decode_evaluation(ask(service, job, evaluation).body).rows == 3
    with pytest.raises(UserError, match="test_dataset_name and test_size exclude each other"):
        make('test_dataset_name = "own.jsonl"\ntest_size = 0.1')


@pytest.mark.parametrize(
    ("own", "more", "reason"),
    [
        ("", "", "this site holds no rows to score (data.test_dataset_name, data.test_size)"),
        (SHARE, '[limits]\ndisclosure = "withheld"',
         "this site withholds what its rows tell (limits.disclosure)"),
        (SHARE, "[limits]\nmin_rows_per_update = 6",
         "the score would be of 5 rows; this site asks for at least 6"),
    ],
)  # fmt: skip
def test_a_site_scores_nothing_unless_its_file_says_so(
    own: str, more: str, reason: str,
    make: Make, job: TrainingJob, plan: RoundPlan, evaluation: EvaluationPlan, told: Told,
) -> None:  # fmt: skip
    service = make(own, more)
    assert refusal(service, job, evaluation) == reason
    assert described(service)["test_rows"] == 0 and not told.heard("loading")
    assert service.answer(request(job, plan)).header["kind"] in ("update", "refused"), "it goes on"


@pytest.mark.parametrize(
    ("changes", "more", "reason"),
    [
        ({"active_experts": 4}, "", "the plan asks for k = 4; this site allows at most 3"),
        ({}, "[limits]\nmax_rank = 2", "the plan asks for rank = 3; this site allows at most 2"),
        ({"round": 9}, "[limits]\nmax_rounds = 8", "the plan asks for round = 9; this site allows at most 8"),
        ({}, "[limits]\nmax_tokens = 159", "the plan asks for tokens = 160; this site allows at most 159"),
        ({"max_new_tokens": 5}, "[limits]\nmax_tokens = 344", "the plan asks for tokens = 345; this site"),
        ({}, "[limits]\nmax_flops = 10.0", "FLOPs; this site allows at most 10"),
        ({}, "[limits]\nmax_memory = 1e-6", "GB of memory; this site allows at most 1e-06 GB"),
        ({"round": -1}, "", "plan with round = -1; 0 to 2.14748e+09 are possible"),
        ({"max_new_tokens": -1}, "", "plan with max_new_tokens = -1; 0 to 2.14748e+09 are possible"),
        ({"active_experts": 0}, "", "plan with active_experts = 0; 1 to "),
        ({"max_new_tokens": True}, "", "max_new_tokens is of type bool; int is needed"),
    ],
)
def test_what_the_file_or_no_plan_allows_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], more: str, reason: str,
    make: Make, job: TrainingJob, evaluation: EvaluationPlan, told: Told,
) -> None:  # fmt: skip
    service = make(SHARE, more)
    site = service._site.folder / "site.toml"
    site.write_text(site.read_text().replace("active_experts = 4", "active_experts = 3"))
    service = TrainerService(load_site(site), told.append)
    assert reason in refusal(service, job, replace(evaluation, **changes))
    assert not told.heard("loading") and not told.heard("scoring")


def test_another_model_under_the_same_name_is_refused(
    make: Make, job: TrainingJob, evaluation: EvaluationPlan, told: Told
) -> None:
    other = job.model_copy(update={"model_digest": "ab" * 16})
    assert "model 'the-model' is another one here" in refusal(make(), other, evaluation)
    assert not told.heard("loading")


def test_rows_to_score_with_a_token_that_the_model_does_not_know_fail_in_a_line(
    make: Make, job: TrainingJob, evaluation: EvaluationPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(rows: list[EncodedRow], vocabulary: int, encoder: object) -> None:
        if len(rows) == 5:
            raise UserError("a token without an embedding")

    monkeypatch.setattr("fedflame.trainer.model.require_known_ids", unknown)
    answer = ask(make(), job, evaluation)
    assert (answer.header["kind"], answer.header["reason"]) == ("failed", "a token without an embedding")


def test_a_plan_of_training_is_none_of_an_evaluation_and_the_other_way_round(
    make: Make, job: TrainingJob, plan: RoundPlan, evaluation: EvaluationPlan
) -> None:
    service = make()
    assert "got a message of kind 'plan'; 'evaluation plan' is needed" in refusal(service, job, plan)
    answer = ask(service, job, evaluation, kind="train")
    assert "got a message of kind 'evaluation plan'; 'plan' is needed" in answer.header["reason"]


def test_a_longer_answer_than_the_context_has_room_for_fails_in_a_line(
    make: Make, job: TrainingJob, evaluation: EvaluationPlan
) -> None:
    answer = ask(make(), job, replace(evaluation, max_new_tokens=100_000))
    assert answer.header["kind"] == "failed"
    assert "must be below the model's context" in answer.header["reason"]


def test_scores_of_few_tokens_are_kept_back(make: Make, job: TrainingJob, evaluation: EvaluationPlan) -> None:
    tokens = decode_evaluation(ask(make(), job, evaluation).body).response_tokens
    enough = make(SHARE, f"[limits]\nmin_tokens_per_update = {tokens}\n")
    assert ask(enough, job, replace(evaluation, round=3)).header["kind"] == "evaluation"
    text = (enough._site.folder / "site.toml").read_text()
    (enough._site.folder / "site.toml").write_text(text.replace(f"= {tokens}\n", f"= {tokens + 1}\n"))
    few = TrainerService(load_site(enough._site.folder / "site.toml"), lambda _: None)
    assert refusal(few, job, replace(evaluation, round=4)) == (
        f"the score would be of {tokens} tokens; this site asks for at least {tokens + 1}"
    )


def test_rows_that_turn_out_to_be_of_no_use_do_not_count() -> None:
    limits = SiteLimits(min_rows_per_update=4, min_tokens_per_update=20)
    require_enough_scored(limits, 4, 20)
    for rows, tokens, what in ((3, 20, "3 rows"), (4, 19, "19 tokens")):
        with pytest.raises(Refusal, match=f"the score would be of {what}; this site asks for at least "):
            require_enough_scored(limits, rows, tokens)


def test_a_site_that_rounds_tells_one_decimal_of_each_mean(
    make: Make, job: TrainingJob, evaluation: EvaluationPlan
) -> None:
    exact = decode_evaluation(ask(make(), job, evaluation).body)
    rough = decode_evaluation(
        ask(make(SHARE, '[limits]\ndisclosure = "rounded"'), job, replace(evaluation, round=3)).body
    )
    assert rough.loss_sum != exact.loss_sum
    assert rough.loss_sum == round(exact.loss_sum / exact.response_tokens, 1) * exact.response_tokens
    assert (rough.rows, rough.response_tokens) == (exact.rows, exact.response_tokens)


def test_rounded_sums_by_hand() -> None:
    told = ClientEvaluation(1, 2, 4, 30, 100, 217.0, 7, 11.0)  # 2.17, 0.2333, 0.3667
    rough = disclosed_scores(told, "rounded")
    assert rough == replace(
        told, loss_sum=pytest.approx(220.0), exact_matches=6, rouge_l_sum=pytest.approx(12.0)
    )  # type: ignore[arg-type]
    assert disclosed_scores(told, "exact") is told
    plain = replace(told, exact_matches=None, rouge_l_sum=None)
    assert disclosed_scores(plain, "rounded") == replace(plain, loss_sum=rough.loss_sum)


def test_the_same_request_has_the_same_answer_also_after_a_kill_and_is_counted_once(
    make: Make, job: TrainingJob, plan: RoundPlan, evaluation: EvaluationPlan, told: Told,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("fedflame.trainer.work.score_tests", killed)
        with pytest.raises(Killed):
            ask(make(), job, evaluation)
    service = make()
    first = ask(service, job, evaluation)
    assert first.header["kind"] == "evaluation"
    assert service.answer(request(job, plan)).header["kind"] == "update", "between them a round is trained"
    again = ask(make(), job, evaluation)
    assert again.body == first.body and told.heard("scores answered again") == 1
    (tmp_path / "state" / RUN / "scores").write_bytes(b"damaged")
    assert ask(make(), job, evaluation).body == first.body
    kinds = [one.kind for one in read_ledger(tmp_path / "state" / FILE_NAME)]
    assert kinds == ["evaluate", "train"]
    scored, trained, _ = read_journal(tmp_path / "state")
    sums = decode_evaluation(first.body)
    assert (scored.kind, scored.run, scored.round, scored.active_experts) == ("evaluation", RUN, 2, 2)
    assert (scored.steps, scored.tokens, trained.kind) == (0, sums.response_tokens, "update")


def test_evaluations_are_limited_by_the_day_as_rounds_are_and_beside_them(
    make: Make, job: TrainingJob, plan: RoundPlan, evaluation: EvaluationPlan
) -> None:
    service = make(SHARE, "[limits]\nmax_rounds_per_day = 1\n")
    assert ask(service, job, evaluation).header["kind"] == "evaluation"
    assert service.answer(request(job, plan)).header["kind"] == "update"
    reason = "this site has scored 1 rounds in 24 hours; it allows at most 1"
    assert refusal(service, job, replace(evaluation, round=3)) == reason


def test_an_evaluation_that_takes_too_long_is_stopped(
    make: Make, job: TrainingJob, evaluation: EvaluationPlan
) -> None:
    service = make(SHARE, "[limits]\nmax_seconds_per_round = 1e-9\n")
    assert "the round takes longer than the 1e-09 s" in refusal(service, job, evaluation)


def test_the_next_plan_with_the_same_adapter_is_its_header_alone(
    make: Make, job: TrainingJob, plan: RoundPlan, evaluation: EvaluationPlan, tmp_path: Path
) -> None:
    """What was sent to be scored is not sent again to be trained."""
    same = replace(plan, adapter=evaluation.adapter, rescaler_values=evaluation.rescaler_values, round=3)
    service, held = make(), encode_plan(evaluation)
    assert ask(service, job, evaluation).header["kind"] == "evaluation"
    addition = encode_addition(memoryview(encode_plan(same)), memoryview(held))
    assert addition is not None and len(addition) < 2000 < len(held)
    assert decode_addition(addition, held) == encode_plan(same)
    header = request(job, same).header | {"addition": True}
    assert service.answer(Envelope(header, addition)).header["kind"] == "update"
    assert (tmp_path / "state" / RUN / "plan").read_bytes() == encode_plan(same)


def test_a_model_that_was_loaded_to_score_is_loaded_again_if_training_needs_more_of_the_cards(
    make: Make, job: TrainingJob, plan: RoundPlan, evaluation: EvaluationPlan, told: Told,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from tests.fake_cards import fake_cards, load_on_cpu

    loaded = load_on_cpu(monkeypatch, "fedflame.trainer.model")
    fake_cards(monkeypatch, tmp_path, (80_000_000_000, 80_000_000_000))
    service = make()
    for number in (3, 4):
        assert ask(service, job, replace(evaluation, round=number)).header["kind"] == "evaluation"
        assert service.answer(request(job, replace(plan, round=number))).header["kind"] == "update"
    assert loaded == ["cuda:0", "cuda:0"], "once to score, and once to train and score"
    assert isinstance(service._work._model, SiteModel) and told.heard(f"loading {MODEL}") == 2
