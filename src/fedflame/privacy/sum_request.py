"""What the members of a group are asked for: one sum over all of them, and over nobody else.

The request is all that a masked answer is for. Its bytes go into every mask, so that members which were told
different things, or were given different adapters, do not add up to a sum.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from fedflame.errors import InvalidMessage
from fedflame.messages import RoundPlan
from fedflame.wire.addition import plan_digest
from fedflame.wire.codec import encode_plan
from fedflame.wire.envelope import Bytes
from fedflame.wire.header import read_header
from fedflame.wire.header_model import HeaderModel

LONGEST = 4 << 20
"""Bytes of a request: thousands of members."""
_Rows = Annotated[int, Field(ge=1, lt=2**63)]


class Member(HeaderModel):
    """One of the group, as the hub names it to all others."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    rows: _Rows
    """Its weight in the sum."""
    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Its public key of this run, of X25519."""
    signature: Annotated[str, Field(pattern="^([0-9a-f]{128})?$")]
    """By its identity; see `privacy.identity`. Empty in a run within one process."""


class SumRequest(HeaderModel):
    """The request to every member of a group whose clients train with equal k."""

    model_config = ConfigDict(extra="forbid")

    run: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    round: Annotated[int, Field(ge=1)]
    active_experts: Annotated[int, Field(ge=1)]
    given: Annotated[str, Field(max_length=200)]
    """`given_digest` of the members' plans."""
    temperature: Annotated[float, Field(ge=0, le=8)]
    """t: an expert's weight is the member's rows times its activation frequency to this power."""
    members: list[Member]
    """At least two, in the order of their names."""

    @model_validator(mode="after")
    def _in_order(self) -> SumRequest:
        names = [member.name for member in self.members]
        if len(names) < 2 or names != sorted(set(names)):
            raise ValueError("must have at least two members, each once, in the order of their names")
        return self

    @property
    def rows(self) -> int:
        """The rows of all members."""
        return sum(member.rows for member in self.members)

    def member(self, name: str) -> Member | None:
        """Return the member of this name."""
        return next((member for member in self.members if member.name == name), None)

    def encoded(self) -> bytes:
        """Return the bytes of the request; equal requests have equal bytes."""
        return json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, message: Bytes) -> SumRequest:
        """Read a request. Raises InvalidMessage if it is too long, or no request."""
        if len(message) > LONGEST:
            raise InvalidMessage(f"request for a sum of {len(message):,} bytes; at most {LONGEST:,}")
        return cls.read(read_header(bytes(message)), "sum")


def given_digest(plan: RoundPlan) -> str:
    """Return the digest of what all members of a group are asked alike: the plan, but for whose it is.

    If one trained with another rate or for other steps than the rest, the sum would show its update. Only the
    steps of the whole run may differ, by which noise is chosen (`RoundPlan.private_steps`).
    """
    return plan_digest(encode_plan(replace(plan, client=0, private_steps=0)))
