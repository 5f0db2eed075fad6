"""Read what a site answers: whatever it says, of whatever type, is used or refused with a reason."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedflame.engines.requests import Request
from fedflame.errors import InvalidMessage, one_line
from fedflame.wire.envelope import Envelope
from fedflame.wire.header_model import HeaderModel

_ANSWERS = {"describe": "description", "train": "update", "evaluate": "evaluation", "sum": "sum"}
"""Kind of a request -> kind of its answer."""
MOST_STEPS_SHOWN = 1_000_000
_Experts = Annotated[int, Field(ge=1, lt=1 << 31)]


class Description(HeaderModel):
    """What a site says of itself."""

    num_examples: Annotated[int, Field(ge=1, lt=2**63)]
    """Rows that it holds."""
    active_experts: _Experts
    """Experts per token that its machine affords."""
    max_active_experts: _Experts
    """Largest k that it lets a plan ask for."""
    test_rows: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Rows that it lets the hub have scored; 0: it scores none."""
    held: str
    """Digest of the last plan of the run that it answered; empty if there is none."""


def read_answer(event: Envelope, request: Request, run: str) -> Envelope:
    """Return the answer in a message of the engine.

    Raises:
        InvalidMessage: it is no envelope, is no answer to this request, or does not come from the site that
            was asked.
    """
    answer = Envelope.from_bytes(event.body)
    if event.header.get("site") != request.site or answer.header.get("site") != request.site:
        raise InvalidMessage(f"it is for {request.site}")
    for name, wanted in (("ticket", request.ticket), ("run", run)):
        if answer.header.get(name) != wanted:
            raise InvalidMessage(f"its {name} is not the one that was asked for")
    wanted = _ANSWERS[request.kind]
    kind = answer.header.get("kind")
    if kind not in (wanted, "refused", "failed", *(["lacking"] if request.addition else [])):
        raise InvalidMessage(f"it is of kind {kind!r}")
    return answer


def said(envelope: Envelope, name: str) -> str:
    """Return a field of a header in words that can be printed, whatever its type is."""
    value = envelope.header.get(name)
    return one_line(value if isinstance(value, str) else repr(value))


def progress(answer: Envelope) -> tuple[int, int]:
    """Return the steps that an answer tells and the tokens of each; zeros if they are no such numbers."""
    steps, tokens = answer.header.get("steps"), answer.header.get("tokens")
    if type(steps) is not int or type(tokens) is not int or steps < 1:
        return 0, 0
    return min(steps, MOST_STEPS_SHOWN), tokens // steps
