"""Every key of the section `privacy`; the docstring of a field is its help."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedflame.config.settings import Section
from fedflame.config.words import Clipping

DELTA = 1e-5


class PrivacyConfig(Section):
    unit: Literal["none", "row"] = "none"
    """What is protected (docs/privacy.md). `none`: nothing is. `row`: each row of a client. In every step the
    client samples its rows at random, scales the gradient of each down to `clip_norm`, and adds noise that
    only it knows. Needs `fedflame[privacy]`. Whoever sets one of the next five keys must set this one."""
    epsilon: Annotated[float, Field(gt=0, le=1000)] = 8.0
    """The most that all rounds together tell of a row: whoever sees every message of the client believes in
    the row being there at most exp(epsilon) times as much as before, but for a chance of `delta`. Each client
    adds the noise that this takes for the number of its rows."""
    delta: Annotated[float, Field(gt=0, lt=1)] = DELTA
    """See `epsilon`. It must be below one over the rows of a client."""
    noise_multiplier: Annotated[float, Field(ge=0, le=1e4)] = 0.0
    """The standard deviation of the noise over `clip_norm`, the same for every client. 0: what `epsilon`
    takes; otherwise epsilon follows from it."""
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """The largest L2 norm of the gradient of a row, over all that the client trains."""
    clipping: Clipping = "row"
    """How gradients are clipped; the result is the same. `row`: one row at a time. `ghost`: many rows
    at once, by their norms alone, which is faster where rows are short. It needs a base in float32, and
    `training.gradient_checkpointing` other than `layers`."""
    secure_aggregation: bool = False
    """Whether clients hide their updates from the hub: it sees sums alone, one over all clients that train
    with equal k (docs/privacy.md). Whoever sets `min_group` must set it."""
    min_group: Annotated[int, Field(ge=2)] = 3
    """With `secure_aggregation`: the fewest clients of a sum. A smaller group is left out of the round."""
