"""What a trainer is asked in tests, and what it says."""

from __future__ import annotations

from typing import Any

from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.wire.codec import encode_plan
from fedflame.wire.envelope import Envelope

RUN = "ab" * 16
MODEL = "the-model"
ROWS = 7


class Told(list[str]):
    def heard(self, words: str) -> int:
        return sum(words in line for line in self)


def request(asked: TrainingJob, plan: RoundPlan, **changes: Any) -> Envelope:
    header = {"kind": "train", "ticket": "t1", "run": RUN, "site": "north", "job": asked.model_dump()}
    return Envelope(header | changes, encode_plan(plan))
