"""What a private run will spend at each client, before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedflame.config.run_config import RunConfig
from fedflame.cost.adapter_size import adapter_parameters
from fedflame.cost.model_shape import ModelShape
from fedflame.cost.run_cost import ClientCost, RunCost
from fedflame.privacy.accounting import epsilon_of
from fedflame.privacy.terms import private_terms
from fedflame.server.sampling import rounds_of

if TYPE_CHECKING:
    from fedflame.experiment.assemble import Experiment


@dataclass(frozen=True)
class PrivateClient:
    """The privacy of one client over the whole run."""

    client: int
    rows: int
    sampling_rate: float
    """The chance of each row to be in a step."""
    steps: int
    """Of all rounds."""
    noise_multiplier: float
    """The standard deviation of the noise over the clip norm."""
    epsilon: float
    """At `privacy.delta`."""
    noise_over_clip: float
    """The norm of the noise in the mean of a step, over the clip norm: what a gradient must be heard against.
    It is noise_multiplier sqrt(values of the adapter) / expected rows of a step."""


def private_clients(
    config: RunConfig, shape: ModelShape, cost: RunCost, rows: Sequence[int]
) -> tuple[PrivateClient, ...]:
    """Return the privacy of each client that has rows; nothing without `privacy.unit = "row"`.

    Args:
        config: the run.
        shape: of its model.
        cost: of the run, for the steps of a round.
        rows: of each client, in client order.

    Raises:
        UserError: see `privacy.terms.private_terms`; or `fedflame[privacy]` is not installed.
    """
    if config.privacy.unit == "none":
        return ()
    work = {client.client: client for client in cost.clients}  # steps and rank are the same for every k
    with_rows = [client for client, count in enumerate(rows) if count]
    return tuple(
        _private_client(config, shape, work[client], rows[client], with_rows) for client in with_rows
    )


def require_private(experiment: Experiment) -> None:
    """Raise UserError if clients of this machine cannot train as privately as the configuration says."""
    config = experiment.config
    if config.privacy.unit == "none":
        return
    from fedflame.training.clipped_sums import require_clippable  # with torch; a plan needs none

    require_clippable(experiment.adapted, config.privacy.clipping)
    rows = [len(part) for part in experiment.federation.parts]
    private_clients(config, experiment.shape, experiment.cost, rows)


def _private_client(
    config: RunConfig, shape: ModelShape, work: ClientCost, rows: int, clients: Sequence[int]
) -> PrivateClient:
    privacy, batch = config.privacy, config.training.per_device_train_batch_size
    whole = work.steps * rounds_of(config, clients, work.client, config.server.num_server_rounds)
    size = shape, work.trained_rank, config.adapter.target_modules
    values = max(adapter_parameters(*size, half).total for half in config.method.halves)
    terms = private_terms(rows, batch, privacy.noise_multiplier, privacy.epsilon, privacy.delta, whole)
    return PrivateClient(
        client=work.client,
        rows=rows,
        sampling_rate=terms.sampling_rate,
        steps=whole,
        noise_multiplier=terms.noise_multiplier,
        epsilon=epsilon_of([terms.spending(whole)], privacy.delta),
        noise_over_clip=terms.noise_multiplier * math.sqrt(values) / terms.expected_units,
    )
