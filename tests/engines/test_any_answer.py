"""Fields of every JSON type in answers, jobs and plans: used, or refused in a line that can be shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engines.driver_here import LEARNED, RUN, answer, described
from tests.engines_here import ThreadEngine
from tests.examples_drawn import MANY
from tests.message_samples import a_plan

from fedflame.engines.answers import Description
from fedflame.engines.clients import EngineClients
from fedflame.engines.hub import HubRounds
from fedflame.engines.jobs import EngineJobs, engine_jobs
from fedflame.errors import InvalidMessage
from fedflame.trainer.job import TrainingJob
from fedflame.wire.codec import decode_plan, encode_plan
from fedflame.wire.envelope import Envelope

SITES = ("north", "south")
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**62, 2**63, 10**400])
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from(["\x1b[2J", "x" * 3000, "update", "refused", RUN]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def changes(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=3), json_values, min_size=1, max_size=3)


class South:
    """Answers as it is told; north is honest."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] = {}

    def deliver(self, site: str, request: bytes) -> bytes:
        honest = described if Envelope.from_bytes(request).header["kind"] == "describe" else answer
        return honest(request, **(self.answer if site == "south" else {}))


@pytest.fixture(scope="module")
def jobs() -> Iterator[tuple[South, ThreadEngine, EngineJobs]]:
    south = South()
    engine = ThreadEngine(south.deliver, set(SITES))
    with engine_jobs(engine, lambda line: None) as found:
        yield south, engine, found


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    description=changes(
        "kind",
        "ticket",
        "run",
        "site",
        "num_examples",
        "active_experts",
        "max_active_experts",
        "held",
        "test_rows",
    ),
    answer=changes("kind", "ticket", "run", "site", "steps", "tokens", "reason"),
)
def test_whatever_one_site_says_the_other_is_used_and_every_line_can_be_shown(
    description: dict[str, Any], answer: dict[str, Any],
    jobs: tuple[South, ThreadEngine, EngineJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("fedflame.engines.clients.encode_addition", lambda plan, held: None)
    monkeypatch.setattr("fedflame.engines.clients.encoded_update_limit", lambda plan: 100)
    monkeypatch.setattr("fedflame.engines.clients.encoded_plan_work", lambda plan: 1.0)
    south, engine, found = jobs
    said: list[str] = []
    rounds = HubRounds(rejoin_timeout=0)
    clients = EngineClients(engine, found, RUN, {}, SITES, rounds, 1, tmp_path, said.append)
    south.answer = description
    assert "north" in clients.describe()
    north, other = clients.num_examples()
    assert north == 7 and type(other) is int and 0 <= other < 2**63
    south.answer = answer
    first, second = clients.train([(0, b"plan 0"), (1, b"plan 1")], lambda tokens: None)
    assert first.update == LEARNED[0] and (second.update == LEARNED[1]) != bool(second.failure)
    assert all(line.isprintable() and len(line) < 1200 for line in [*said, second.failure])


JOB = {
    "model_name_or_path": "m", "model_digest": "d", "dtype": "float32", "r": 3, "lora_alpha": 6.0,
    "use_rslora": False, "target_modules": "q_proj", "max_length": 32, "num_server_rounds": 5,
    "template_digest": "ab", "assistant_only_loss": True, "completion_only_loss": "auto",
    "train_on_eos": True,
}  # fmt: skip


@settings(max_examples=MANY, deadline=None)
@given(changes(*JOB) | st.just({}), st.sampled_from([*JOB, ""]))
def test_a_job_is_of_just_the_types_that_it_must_have_or_refused(changed: dict[str, Any], gone: str) -> None:
    said = {name: value for name, value in (JOB | changed).items() if name != gone}
    try:
        job = TrainingJob.read(said, "job")
    except InvalidMessage as reason:
        assert str(reason).startswith("job") and str(reason).isprintable()
        return
    assert job.model_dump().keys() == said.keys()
    for name, value in job.model_dump().items():
        assert type(value) is type(JOB[name]) and value == said[name]
        assert (type(said[name]) is bool) == (type(JOB[name]) is bool)


@pytest.mark.parametrize(
    ("name", "least"), [("r", 1), ("lora_alpha", 5e-324), ("max_length", 8), ("num_server_rounds", 1)]
)
def test_a_job_has_the_least_numbers_with_which_there_is_training(name: str, least: float) -> None:
    assert getattr(TrainingJob.read(JOB | {name: least}, "job"), name) == least
    for less in (least - 1, type(least)(0)):
        with pytest.raises(InvalidMessage, match=rf"^job\.{name} = "):
            TrainingJob.read(JOB | {name: less}, "job")


@pytest.mark.parametrize(
    ("name", "most"),
    [("num_examples", 2**63 - 1), ("active_experts", 2**31 - 1), ("max_active_experts", 2**31 - 1)],
)
def test_a_site_describes_itself_with_numbers_that_there_can_be(name: str, most: int) -> None:
    said = {"num_examples": 7, "active_experts": 2, "max_active_experts": 2, "held": ""}
    for number in (1, most):
        assert getattr(Description.read(said | {name: number}, "description"), name) == number
    for number in (0, most + 1):
        with pytest.raises(InvalidMessage, match=rf"^description\.{name} = {number}: "):
            Description.read(said | {name: number}, "description")


NUMBERS = (
    "round", "client", "seed", "active_experts", "learning_rate", "weight_decay", "batch_size", "max_steps",
    "tokens_per_step", "proximal_mu", "rank_penalty", "kept_rank",
)  # fmt: skip


@settings(max_examples=MANY, deadline=None)
@given(st.sampled_from(NUMBERS), st.integers(-(2**63), 2**63 - 1) | st.floats())
def test_a_plan_that_decodes_has_numbers_with_which_training_ends(name: str, value: float) -> None:
    plan = a_plan()
    message = encode_plan(replace(plan, **{name: value}))
    try:
        read = decode_plan(message)
    except InvalidMessage as reason:
        assert str(reason).startswith(("plan with ", f"{name} is "))
        return
    assert (
        1 <= read.batch_size <= 2**31 and 1 <= read.max_steps <= 2**31 and 0 <= read.tokens_per_step <= 2**31
    )
    assert 0 <= read.learning_rate <= 1e6 and 1 <= read.active_experts <= 5 and 0 <= read.kept_rank <= 3
