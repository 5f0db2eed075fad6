"""What a trainer is asked in tests, and what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fedflame.messages import RoundPlan
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.wire.codec import encode_plan
from fedflame.wire.envelope import Envelope

RUN = "ab" * 16
MODEL = "the-model"
ROWS = 7
LIMITS = "[limits]\n"
"""The section of a site's file; its keys follow."""
Make = Callable[..., TrainerService]
"""What the fixture `make_service` is."""


class Told(list[str]):
    def heard(self, words: str) -> int:
        return sum(words in line for line in self)

    def will_hear(self, words: str) -> int:
        """What a service says on a thread of its own, after the connection has ended."""
        deadline = time.monotonic() + 10
        while not self.heard(words) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.heard(words)


def request(asked: TrainingJob, plan: RoundPlan, **changes: Any) -> Envelope:
    header = {"kind": "train", "ticket": "t1", "run": RUN, "site": "north", "job": asked.model_dump()}
    return Envelope(header | changes, encode_plan(plan))
