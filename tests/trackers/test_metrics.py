"""What a tracker is told of a round, beside numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fedflame.trackers.metrics import round_metrics, step_metrics


def client(k: int, loss: float | None, tokens: int, seconds: float, rate: float) -> dict[str, Any]:
    return {
        "event": "client", "round": 2, "client": 0, "active_experts": k, "rank": 4, "loss": loss,
        "learning_rate": rate, "tokens": tokens, "seconds": seconds, "training_flops": 10.0 * tokens,
        "bytes_up": 7, "bytes_down": 11,
    }  # fmt: skip


def evaluation(k: int, category: str | None, loss: float, exact: float | None) -> dict[str, Any]:
    event = {"event": "evaluation", "round": 2, "active_experts": k, "category": category, "loss": loss}
    return event | {"exact_match": exact, "rouge_l": None, "rows": 5}


def test_a_round_by_hand() -> None:
    events = [
        client(8, 3.0, 100, 2.0, 0.5),
        client(8, 1.0, 300, 6.0, 0.5),
        client(1, None, 600, 12.0, 0.1),
        {"event": "excluded", "round": 2, "client": 3, "active_experts": 1, "reason": "late"},
        {"event": "clipped", "round": 2, "client": 0, "share": 0.5},
        {"event": "round", "round": 2, "clients": 3, "seconds": 21.5},
        evaluation(8, None, 1.25, 0.75),
        evaluation(8, "sums", 9.0, 0.0),
        evaluation(1, None, 1.75, None),
        {"event": "deployment", "round": 2, "active_experts": 1, "rank": 4, "loss": 2.0, "rouge_l": 0.25},
        {"event": "of a later version", "round": 2},
    ]
    assert round_metrics(events) == {
        "eval/loss/k8": 1.25,
        "eval/exact_match/k8": 0.75,
        "eval/loss/k1": 1.75,
        "eval/loss/k1_r4": 2.0,
        "eval/rouge_l/k1_r4": 0.25,
        "train/loss": (3.0 * 100 + 1.0 * 300) / 400,
        "train/loss/k8": 1.5,
        "train/learning_rate": (0.5 + 0.5 + 0.1) / 3,
        "train/learning_rate/k8": 0.5,
        "train/learning_rate/k1": 0.1,
        "train/tokens": 1000,
        "train/training_flops": 10_000.0,
        "train/bytes_up": 21,
        "train/bytes_down": 33,
        "train/seconds": 20 / 3,
        "train/seconds/k8": 4.0,
        "train/seconds/k1": 12.0,
        "train/tokens_per_second": 50.0,
        "train/tokens_per_second/k8": 50.0,
        "train/tokens_per_second/k1": 50.0,
        "round/seconds": 21.5,
        "clients/used": 3,
        "clients/excluded": 1,
        "clients/clipped": 1,
        "clients/outliers": 0,
    }


def test_the_steps_of_a_round_by_hand() -> None:
    """Round 3 of four steps each is steps 9 to 12; a client with two steps is drawn over the whole round."""

    def stepped(k: int, losses: list[float], rates: list[float]) -> dict[str, Any]:
        return client(k, 1.0, 10, 1.0, 0.5) | {"step_losses": losses, "step_rates": rates}

    events = [
        stepped(8, [4.0, 3.0, 2.0, 1.0], [0.4, 0.3, 0.2, 0.1]),
        stepped(8, [2.0, 2.0, 2.0, 2.0], [0.4, 0.3, 0.2, 0.1]),
        stepped(2, [6.0, 5.0], [0.4, 0.2]),
        stepped(1, [], []),
        {"event": "round", "round": 3, "clients": 3, "seconds": 21.5},
    ]
    found = step_metrics(events, 3, 4)
    assert list(found) == [9, 10, 11, 12]
    assert found[9] == pytest.approx({"train/step_loss/k8": 3.0, "train/step_learning_rate/k8": 0.4})
    assert found[10] == pytest.approx(
        {
            "train/step_loss/k8": 2.5,
            "train/step_learning_rate/k8": 0.3,
            "train/step_loss/k2": 6.0,
            "train/step_learning_rate/k2": 0.4,
        }
    )
    assert found[12]["train/step_loss/k2"] == 5.0
    unequal = [stepped(8, [4.0, 3.0, 2.0, 1.0], [1.0] * 4), stepped(8, [8.0, 6.0], [1.0] * 2)]
    mixed = {step: values["train/step_loss/k8"] for step, values in step_metrics(unequal, 1, 4).items()}
    assert mixed == {2: (3.5 + 8.0) / 2, 4: (1.5 + 6.0) / 2}


def test_a_run_of_before_has_no_learning_rates_and_round_0_no_clients() -> None:
    old = client(2, 1.0, 10, 0.0, 0.1)
    del old["learning_rate"]
    assert round_metrics([old]).keys() >= {"train/loss/k2"}
    assert not any("rate" in name or "per_second" in name for name in round_metrics([old]))
    assert round_metrics([evaluation(4, None, 2.5, None)]) == {"eval/loss/k4": 2.5}
