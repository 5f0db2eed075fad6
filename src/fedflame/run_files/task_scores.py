"""The scores of a run in tasks of lm-evaluation-harness, by k, with speed and memory: `tasks.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedflame.checked_json import read_checked, write_checked
from fedflame.errors import UserError

FILE_NAME = "tasks.json"
_ADVICE = "evaluate the tasks again, or remove the file"
_Positive = Annotated[float, Field(gt=0)]
_Word = Annotated[str, Field(max_length=1000)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Metric(_Record):
    """One metric of one task."""

    task: _Word
    name: _Word
    """As the harness names it, with its filter if it has one: `acc`, `exact_match,strict-match`."""
    value: float
    stderr: float | None
    """Standard error; None where the harness gives none."""


class ScoresAtK(_Record):
    """What the model scores and costs with this many experts per token."""

    active_experts: Annotated[int, Field(ge=1)]
    metrics: list[Metric]
    prompt_tokens_per_second: _Positive
    """Of one prompt, up to its first new token."""
    new_tokens_per_second: _Positive
    """Of one answer, after its first token."""
    peak_memory: Annotated[int, Field(ge=0)] | None
    """Bytes: on cards what torch held at most, on a CPU what the process did; None where it is not known."""


class TaskScores(_Record):
    """One evaluation in tasks, at one k after another."""

    round: Annotated[int, Field(ge=0)]
    """The last round of the run when it was scored; 0 for what is no run."""
    lm_eval: _Word
    """Version of the harness."""
    num_fewshot: int | None
    """None: the tasks' own."""
    limit: float | None
    """Rows per task, or below 1 their share; None: all."""
    apply_chat_template: bool
    device: _Word
    dtype: _Word
    """Of the frozen base."""
    by_k: list[ScoresAtK]

    def in_words(self) -> str:
        """Return how it was measured."""
        shots = "each task's own number of" if self.num_fewshot is None else str(self.num_fewshot)
        rows = "all rows" if self.limit is None else f"limit {self.limit:g}"
        template = ", chat template applied" if self.apply_chat_template else ""
        return (
            f"lm-evaluation-harness {self.lm_eval}, {shots} few-shot examples, {rows}{template}; "
            f"{self.dtype} on {self.device}"
        )


def write_task_scores(run: Path, scores: TaskScores) -> None:
    """Write the scores into a run folder, in the place of earlier ones. Raises UserError on a full disk."""
    write_checked(run / FILE_NAME, scores.model_dump())


def read_task_scores(run: Path) -> TaskScores | None:
    """Return the scores in a run folder, or None if there are none. Raises UserError if they are damaged."""
    path = run / FILE_NAME
    if not path.exists():
        return None
    try:
        return TaskScores.model_validate(read_checked(path, _ADVICE))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {place}: {first['msg']}; {_ADVICE}") from error
