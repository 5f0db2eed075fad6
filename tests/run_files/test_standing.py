"""Which round is best and how long none was better: by hand, and beside transformers' own callback."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
from transformers import TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, TrainerControl, TrainerState

from fedflame.config.words import BestMetric
from fedflame.run_files.standing import Best, Standing, best_rounds, in_words, standings, taken

LOSSES = [
    (0, 4, 3.0),
    (0, 1, 5.0),
    (1, 4, 2.0),
    (1, 1, 5.5),
    (2, 4, 2.0),
    (2, 1, 4.0),
    (4, 4, 9.0),
    (4, 1, 4.5),
]


def test_each_k_has_its_first_best_round_and_the_mean_is_waited_for() -> None:
    found = standings(LOSSES, "loss")
    assert [(one.round, one.mean, one.waited) for one in found] == [
        (0, Best(0, 4.0), 0),
        (1, Best(1, 3.75), 0),
        (2, Best(2, 3.0), 0),
        (4, Best(2, 3.0), 1),
    ]
    assert [best_rounds(found, number) for number in range(-1, 5)] == [
        {}, {4: 0, 1: 0}, {4: 1, 1: 0}, {4: 1, 1: 2}, {4: 1, 1: 2}, {4: 1, 1: 2},
    ]  # fmt: skip


def test_of_a_score_more_is_better_and_what_was_not_taken_does_not_count() -> None:
    values = [(0, 2, 0.1), (1, 2, None), (2, 2, 0.3), (3, 2, None), (4, 2, 0.2)]
    found = standings(values, "exact_match")
    assert [(one.round, one.of_tier[2], one.waited) for one in found] == [
        (0, Best(0, 0.1), 0), (2, Best(2, 0.3), 0), (4, Best(2, 0.3), 1),
    ]  # fmt: skip


@pytest.mark.parametrize("metric", ["loss", "rouge_l"])
def test_what_is_not_finite_is_never_best(metric: BestMetric) -> None:
    broken = [math.nan, math.inf, -math.inf]
    found = standings([(at, 4, value) for at, value in enumerate([*broken, 1.0, *broken])], metric)
    assert [one.of_tier for one in found] == [{}] * 3 + [{4: Best(3, 1.0)}] * 4
    assert [one.waited for one in found] == [1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
@pytest.mark.parametrize("threshold", [0.0, 0.15])
def test_a_run_waits_as_transformers_callback_does(metric: BestMetric, threshold: float) -> None:
    rng = random.Random(f"{metric}{threshold}")
    arguments = TrainingArguments(metric_for_best_model=f"eval_{metric}", greater_is_better=metric != "loss")
    for _ in range(30):
        callback, state, standing = EarlyStoppingCallback(4, threshold), TrainerState(), Standing()
        for number in range(12):
            values = {k: round(rng.random(), 1) for k in (4, 2, 1)}
            mean = fmean(values.values())
            callback.check_metric_value(arguments, state, TrainerControl(), mean)
            better = (mean < state.best_metric) == (metric == "loss") if state.best_metric else True
            state.best_metric = mean if better and mean != state.best_metric else state.best_metric
            standing = standing.after(number, values, metric, threshold)
            assert standing.waited == callback.early_stopping_patience_counter
            assert standing.mean and standing.mean.value == state.best_metric


def test_lines_of_categories_and_of_other_events_are_passed_over() -> None:
    line = {"event": "evaluation", "round": 3, "active_experts": 2, "category": None, "loss": 1.5}
    events = [line, line | {"category": "x", "loss": 1.0}, {"event": "round", "round": 3}]
    assert taken(events, "loss") == [(3, 2, 1.5)]


def test_rounds_in_words() -> None:
    assert in_words({1: 3, 8: 10}, 10) == "k = 8: round 10 of 10; k = 1: round 3 of 10"
