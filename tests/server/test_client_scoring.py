"""Evaluation at the clients: their sums are those of the same rows in one place, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.json_lines import write_lines
from tests.message_samples import MAX_LENGTH, adapter_of, random_numbers
from tests.tiny_runs import ANSWERS, events, state_bytes, tiny_config, tiny_run

from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients
from fedflame.data.federation import load_federation
from fedflame.errors import InvalidMessage
from fedflame.experiment.api import evaluate as score_run
from fedflame.experiment.assemble import Experiment, assemble
from fedflame.messages import ClientEvaluation, EvaluationPlan
from fedflame.run_files.lines import read_lines
from fedflame.server.checkpoint import read_checkpoint
from fedflame.server.validation import MOST_LOSS, MOST_TEST_ROWS, validate_evaluation
from fedflame.wire.codec import asks_for_scores, decode_evaluation, encode_evaluation, encode_plan

ASKED = ("server.fraction_evaluate=1", "evaluation.client_test_size=0.3", "data.max_rows=60")
SUMS = ("rows", "response_tokens", "loss_sum", "exact_matches", "rouge_l_sum")


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds; before and after them, answers are generated."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    tiny_run(tiny_folder, folder, *ASKED, ANSWERS)
    return folder


def scores(run: Path) -> list[dict[str, Any]]:
    return events(run, "client_evaluation")


def sums(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(event[name] for name in ("round", "client", "rank", *SUMS)) for event in scores(run)]


def loaded(run: Path, tiny_folder: Path) -> Experiment:
    config = tiny_config(tiny_folder, run, *ASKED, ANSWERS)
    return assemble(config, load_federation(config))


@pytest.mark.slow
def test_each_client_scores_its_rows_at_its_k_with_the_adapter_and_rescaler_of_its_tier(
    run: Path, tiny_folder: Path
) -> None:
    """Against transformers' own logits, row by row."""
    experiment, state = loaded(run, tiny_folder), read_checkpoint(run).state
    assert len({id(state.adapter_at(k)) for k in (4, 2, 1)}) == 3, "each tier has its own"
    last = {event["client"]: event for event in scores(run) if event["round"] == 3}
    assert [event["active_experts"] for event in last.values()] == [4, 2, 1]
    adapted, model = experiment.adapted, experiment.adapted.model
    for client, k in enumerate((4, 2, 1)):
        adapted.load(state.adapter_at(k), state.rescalers[k], state.merged)
        loss, tokens = 0.0, 0
        rows = experiment.encoded.tests[client].encoded
        with torch.no_grad(), adapted.active_experts(k):
            for row in rows:
                logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
                said = logits.log_softmax(-1)
                for place in range(row.prompt_length, len(row.ids)):
                    loss -= float(said[place - 1, row.ids[place]])
                    tokens += 1
        told = last[client]
        assert (told["rows"], told["response_tokens"]) == (len(rows), tokens) and len(rows) > 1
        assert told["loss_sum"] == pytest.approx(loss, rel=1e-5)
        assert told["loss"] == told["loss_sum"] / tokens


@pytest.mark.parametrize("method", ["flame", "fedex_lora"])
def test_the_sums_of_a_tier_are_those_of_its_rows_in_one_place(
    method: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Three clients of one k: `evaluate` scores all their rows as held-out. fedex_lora merges factors."""
    named = f"strategy.name={method}"
    shared = ("clients.active_experts=2", ANSWERS, "server.num_server_rounds=1", named)
    tiny_run(tiny_folder, tmp_path / "run", *ASKED, *shared)
    config = tiny_config(tiny_folder, tmp_path / "run", *ASKED, *shared)
    rows = [row for tests in load_federation(config).tests for row in tests]
    path = tmp_path / "all.jsonl"
    fields = [
        {"instruction": row.turns[0].content, "context": row.turns[0].context, "response": row.response}
        for row in rows
    ]
    write_lines(path, fields)
    together = score_run(tmp_path / "run", overrides=[f"evaluation.dataset_name={path}"])[2]["all"]
    by_tier, everyone = [e for e in events(tmp_path / "run", "federated_evaluation") if e["round"] == 1]
    assert (by_tier["active_experts"], by_tier["rank"], by_tier["clients"]) == (2, 3, 3)
    assert (everyone["active_experts"], everyone["rank"], everyone["clients"]) == (None, None, 3)
    for name in ("loss", "exact_match", "rouge_l", "rows", "response_tokens"):
        assert by_tier[name] == everyone[name] == pytest.approx(together.to_json()[name], rel=1e-5), name
    assert together.rows == len(rows)


def test_every_evaluated_round_is_scored_and_answers_are_generated_in_turn(run: Path) -> None:
    told = scores(run)
    assert [(e["round"], e["client"]) for e in told] == [(r, c) for r in range(4) for c in range(3)]
    for event in told:
        generated = event["round"] in (0, 3)
        assert (event["exact_matches"] is not None) == (event["rouge_l_sum"] is not None) == generated
        assert event["bytes_up"] < 2000 < event["bytes_down"] and event["seconds"] >= 0
    tiers = events(run, "federated_evaluation")
    assert [e["active_experts"] for e in tiers if e["round"] == 1] == [4, 2, 1, None]
    for event in tiers:
        of = [
            e
            for e in told
            if e["round"] == event["round"] and event["active_experts"] in (None, e["active_experts"])
        ]
        assert event["clients"] == len(of) and event["rows"] == sum(e["rows"] for e in of)
        tokens = sum(e["response_tokens"] for e in of)
        assert event["loss"] == pytest.approx(sum(e["loss_sum"] for e in of) / tokens)


@pytest.mark.slow
def test_rounds_that_are_not_evaluated_ask_no_client(tiny_folder: Path, tmp_path: Path) -> None:
    tiny_run(tiny_folder, tmp_path / "run", *ASKED, "evaluation.evaluate_every=2")
    assert {event["round"] for event in scores(tmp_path / "run")} == {0, 2, 3}


@pytest.mark.slow
def test_a_share_of_the_clients_is_drawn_anew_for_each_round(tiny_folder: Path, tmp_path: Path) -> None:
    few = ("server.fraction_evaluate=0.34", "server.num_server_rounds=8", "training.max_steps=1")
    tiny_run(tiny_folder, tmp_path / "run", *ASKED, *few)
    drawn = [event["client"] for event in scores(tmp_path / "run")]
    assert len(drawn) == 9 and len(set(drawn)) > 1


@pytest.mark.slow
def test_a_device_with_a_cut_adapter_scores_its_first_ranks(tiny_folder: Path, tmp_path: Path) -> None:
    method = ("strategy.name=hetlora", "clients.ranks=3,2,1", "server.num_server_rounds=1")
    tiny_run(tiny_folder, tmp_path / "run", *ASKED, *method)
    last = [event for event in scores(tmp_path / "run") if event["round"] == 1]
    assert [(event["active_experts"], event["rank"]) for event in last] == [(4, 3), (4, 2), (4, 1)]
    state = read_checkpoint(tmp_path / "run").state
    config = tiny_config(tiny_folder, tmp_path / "run", *ASKED, *method)
    experiment = assemble(config, load_federation(config))
    plan = EvaluationPlan(1, 2, 4, state.rescalers[4], state.adapter.with_rank(1), state.merged)
    clients = LocalClients(experiment.adapted, [], 0, None, tests=experiment.tests)  # type: ignore[arg-type]
    (answer,) = clients.evaluate([(2, encode_plan(plan))])
    assert decode_evaluation(answer.update).loss_sum == last[2]["loss_sum"]
    tiers = [e for e in events(tmp_path / "run", "federated_evaluation") if e["round"] == 1]
    assert [e["rank"] for e in tiers] == [3, 2, 1, None]


@pytest.mark.slow
def test_what_clients_score_changes_nothing_of_the_training(tiny_folder: Path, tmp_path: Path) -> None:
    for client, count in enumerate((20, 12, 9)):
        lines = [
            {"instruction": f"say {n}", "output": str(n)} for n in range(client * 100, client * 100 + count)
        ]
        text = write_lines(tmp_path / f"silo-{client}.jsonl", lines).read_text()
        (tmp_path / f"test-{client}.jsonl").write_text(text.replace("say", "tell")[: text.index("\n") + 1])
    files = (f"data.client_files={tmp_path}/silo-*.jsonl", "data.max_rows=0")
    tests = (f"data.client_test_files={tmp_path}/test-*.jsonl", "server.fraction_evaluate=1")
    tiny_run(tiny_folder, tmp_path / "plain", *files)
    tiny_run(tiny_folder, tmp_path / "scored", *files, *tests)
    assert state_bytes(tmp_path / "plain") == state_bytes(tmp_path / "scored")
    assert scores(tmp_path / "scored") and not scores(tmp_path / "plain")
    assert all(event["rows"] == 1 for event in scores(tmp_path / "scored"))


def evaluating(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[int, ClientEvaluation], Answer | ClientEvaluation]
) -> None:
    """Have the answers of evaluations changed, by their number, on their way to the server."""
    answer, count = LocalClients.answer, iter(range(1000))

    def changed(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        given = answer(self, plan, on_step)
        if not asks_for_scores(plan) or given.failure:
            return given
        new = change(next(count), decode_evaluation(given.update))
        return new if isinstance(new, Answer) else replace(given, update=encode_evaluation(new))

    monkeypatch.setattr(LocalClients, "answer", changed)


@pytest.mark.slow
def test_a_resumed_run_has_the_sums_and_the_bytes_of_one_that_was_not(
    run: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(number: int, told: ClientEvaluation) -> ClientEvaluation:
        if number == 7:  # the second client after round 2
            raise KeyboardInterrupt
        return told

    with monkeypatch.context() as patch:
        evaluating(patch, ends)
        with pytest.raises(KeyboardInterrupt, match="goes on after round 1"):
            tiny_run(tiny_folder, tmp_path / "run", *ASKED, ANSWERS)
    tiny_run(tiny_folder, tmp_path / "run", *ASKED, ANSWERS, existing="resume")
    assert sums(tmp_path / "run") == sums(run)
    assert state_bytes(tmp_path / "run") == state_bytes(run)


NONSENSE: list[Callable[[ClientEvaluation], Answer | ClientEvaluation]] = [
    lambda told: replace(told, loss_sum=float("nan")),
    lambda told: replace(told, rows=2**40),
    lambda told: replace(told, loss_sum="much"),  # type: ignore[arg-type]
    lambda told: Answer(b"nothing", "", 1.0),
    lambda told: Answer(b"", "the site refuses: no", 1.0),
]


@pytest.mark.slow
def test_a_client_that_answers_nonsense_is_left_out_and_the_others_are_summed(
    run: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another nonsense after each round."""
    rounds = f"server.num_server_rounds={len(NONSENSE) - 1}"
    evaluating(monkeypatch, lambda _, told: NONSENSE[told.round](told) if told.client == 1 else told)
    shown = tiny_run(tiny_folder, tmp_path / "run", *ASKED, ANSWERS, rounds, "training.max_steps=1")
    assert "round 1: client 1 is left out of the evaluation:" in shown.replace("\n", " ")
    excluded = events(tmp_path / "run", "evaluation_excluded")
    assert [(event["round"], event["client"]) for event in excluded] == [(at, 1) for at in range(5)]
    assert sums(tmp_path / "run")[:2] == [told for told in sums(run)[:3] if told[1] != 1]
    for at in range(len(NONSENSE)):
        of_round = [e for e in events(tmp_path / "run", "federated_evaluation") if e["round"] == at]
        assert [(e["active_experts"], e["clients"]) for e in of_round] == [(4, 1), (1, 1), (None, 2)]
        assert all(0 < event["loss"] < 100 for event in of_round)


@pytest.mark.slow
def test_a_run_whose_clients_all_fail_goes_on_without_a_figure(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluating(monkeypatch, lambda number, told: Answer(b"", "gone", 1.0))
    tiny_run(tiny_folder, tmp_path / "run", *ASKED)
    assert not events(tmp_path / "run", "federated_evaluation") and not scores(tmp_path / "run")
    assert len(events(tmp_path / "run", "round")) == 3


def test_a_client_without_rows_to_score_is_not_asked(tiny_folder: Path, tmp_path: Path) -> None:
    for client, texts in enumerate((["a", "b", "c"], ["alone"], ["d", "e", "f"])):
        lines = [{"instruction": text, "output": text} for text in texts]
        write_lines(tmp_path / f"silo-{client}.jsonl", lines)
    files = f"data.client_files={tmp_path}/silo-*.jsonl"
    tiny_run(tiny_folder, tmp_path / "run", *ASKED, files, "server.num_server_rounds=1")
    assert {event["client"] for event in scores(tmp_path / "run")} <= {0, 2}
    assert not events(tmp_path / "run", "evaluation_excluded")


PLAN = EvaluationPlan(
    3, 7, 2, torch.ones(2), adapter_of((2, 5, 3, 7, 4), random_numbers, torch.Generator()), max_new_tokens=4
)
TOLD = ClientEvaluation(3, 7, 2, 5, 40, 60.0, 2, 2.5)


def test_an_honest_evaluation_is_used_up_to_its_bounds() -> None:
    for told in (
        TOLD,
        replace(TOLD, loss_sum=0.0, exact_matches=0, rouge_l_sum=0.0),
        replace(TOLD, response_tokens=5 * MAX_LENGTH, exact_matches=5, rouge_l_sum=5.0),
        replace(TOLD, response_tokens=1, loss_sum=MOST_LOSS),
    ):
        validate_evaluation(told, PLAN, MAX_LENGTH, 5)
    plain = replace(TOLD, exact_matches=None, rouge_l_sum=None)
    validate_evaluation(plain, replace(PLAN, max_new_tokens=0), MAX_LENGTH, None)
    validate_evaluation(replace(TOLD, rows=MOST_TEST_ROWS), PLAN, MAX_LENGTH, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 2}, "evaluation is for round 2; 3 was asked for"),
        ({"client": 6}, "evaluation is for client 6; 7 was asked for"),
        ({"active_experts": 3}, "evaluation is for active_experts 3; 2 was asked for"),
        ({"rows": 0}, "evaluation has rows = 0; 1 to 5 are possible"),
        ({"rows": 6}, "evaluation has rows = 6; 1 to 5 are possible"),
        ({"response_tokens": 0}, "evaluation has response_tokens = 0; 1 to 100 are possible"),
        ({"response_tokens": 101}, "evaluation has response_tokens = 101; 1 to 100 are possible"),
        ({"loss_sum": -0.1}, "evaluation has loss_sum = -0.1; 0 to 4e"),
        ({"loss_sum": float("nan")}, "evaluation has loss_sum = nan; 0 to 4e"),
        ({"loss_sum": float("inf")}, "evaluation has loss_sum = inf; 0 to 4e"),
        ({"loss_sum": 41 * MOST_LOSS}, "evaluation has loss_sum = 41000000.0; 0 to 4e"),
        ({"exact_matches": -1}, "evaluation has exact_matches = -1; 0 to 5 are possible"),
        ({"exact_matches": 6}, "evaluation has exact_matches = 6; 0 to 5 are possible"),
        ({"rouge_l_sum": 5.1}, "evaluation has rouge_l_sum = 5.1; 0 to 5 are possible"),
        ({"rouge_l_sum": float("nan")}, "evaluation has rouge_l_sum = nan; 0 to 5 are possible"),
        ({"exact_matches": None}, "evaluation has other scores than those that were asked for"),
        ({"rouge_l_sum": None}, "evaluation has other scores than those that were asked for"),
    ],
)
def test_an_impossible_evaluation_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        validate_evaluation(replace(TOLD, **changes), PLAN, MAX_LENGTH, 5)
    assert str(refused.value).startswith(reason)


def test_scores_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(InvalidMessage, match="other scores than those that were asked for"):
        validate_evaluation(TOLD, replace(PLAN, max_new_tokens=0), MAX_LENGTH, 5)


def test_a_run_that_asks_nobody_has_no_line_of_it(undisturbed: Callable[..., Path]) -> None:
    kinds = {event["event"] for event in read_lines(undisturbed() / "metrics.jsonl")}
    assert not kinds & {"client_evaluation", "federated_evaluation", "evaluation_excluded"}
