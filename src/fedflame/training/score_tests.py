"""A client's part in an evaluation: the global model on the rows that the client holds to score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedflame.data.client_tests import EncodedTests
from fedflame.data.encoder import Encoder
from fedflame.messages import ClientEvaluation, EvaluationPlan
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.evaluation import HeldOut, evaluate
from fedflame.training.scores import total


def rows_to_score(tests: EncodedTests, encoder: Encoder) -> HeldOut:
    """Return the rows of a client as `evaluate` takes them; the plan says how long an answer may be."""
    return HeldOut(tests.rows, tests.encoded, tests.prompts, encoder, max_new_tokens=0)


def score_tests(
    adapted: AdaptedModel, tests: HeldOut, plan: EvaluationPlan, on_batch: Callable[[int], None]
) -> ClientEvaluation:
    """Carry out the plan of an evaluation.

    Args:
        adapted: the base model; it loads the values of the plan.
        tests: the rows that the client is scored on, at least one.
        plan: the plan.
        on_batch: called after every batch with the number of its tokens.

    Raises:
        UserError: the values do not fit the model.
    """
    generate = plan.max_new_tokens > 0
    # Without an answer, a prompt takes no room in a batch, whoever has encoded it.
    prompts = tests.prompts if generate else []
    tests = replace(tests, prompts=prompts, max_new_tokens=plan.max_new_tokens)
    values = plan.adapter, plan.active_experts, plan.rescaler_values
    scores = total(evaluate(adapted, tests, *values, generate, plan.merged, on_batch))
    return ClientEvaluation(
        round=plan.round,
        client=plan.client,
        active_experts=plan.active_experts,
        rows=scores.rows,
        response_tokens=scores.response_tokens,
        loss_sum=scores.loss_sum,
        exact_matches=scores.exact_matches,
        rouge_l_sum=scores.rouge_l_sum,
    )
