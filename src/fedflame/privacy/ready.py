"""What a client says when it has trained for a masked sum: its update waits until the group is known."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from fedflame.errors import InvalidMessage
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.wire.envelope import Bytes
from fedflame.wire.header import read_header
from fedflame.wire.header_model import HeaderModel

LONGEST = 1 << 12
"""Bytes of the message."""
_Rows = Annotated[int, Field(ge=1, lt=2**63)]


class Ready(HeaderModel):
    """What the hub must know of an update that it never sees."""

    model_config = ConfigDict(extra="forbid")

    num_examples: _Rows
    trained_examples: _Rows
    steps: Annotated[int, Field(ge=1, lt=2**31)]
    sampling_rate: Annotated[float, Field(ge=0, le=1)]
    noise_multiplier: Annotated[float, Field(ge=0)]
    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """See `Member`."""
    signature: Annotated[str, Field(pattern="^([0-9a-f]{128})?$")]

    @classmethod
    def of(cls, update: ClientUpdate, key: str, signature: str = "") -> Ready:
        """Return what is said of this update."""
        return cls(
            num_examples=update.num_examples,
            trained_examples=update.trained_examples,
            steps=update.steps,
            sampling_rate=update.sampling_rate,
            noise_multiplier=update.noise_multiplier,
            key=key,
            signature=signature,
        )

    def encoded(self) -> bytes:
        """Return the bytes of the message."""
        return self.model_dump_json().encode()

    @classmethod
    def decode(cls, message: Bytes, plan: RoundPlan) -> Ready:
        """Read the answer to a plan.

        Raises:
            InvalidMessage: it is too long or none, or claims what the plan does not allow.
        """
        if len(message) > LONGEST:
            raise InvalidMessage(f"an answer of {len(message):,} bytes where {LONGEST:,} are the most")
        ready = cls.read(read_header(bytes(message)), "ready")
        if ready.steps > plan.max_steps or ready.trained_examples > ready.num_examples:
            raise InvalidMessage(f"claims {ready.steps} steps on {ready.trained_examples} rows")
        return ready
