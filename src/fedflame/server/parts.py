"""The parts of a run that its rounds work with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedflame.clients.answers import Clients
from fedflame.config.run_config import RunConfig
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.server.metrics import MetricsFile
from fedflame.server.progress import Reporter
from fedflame.strategies.base import ClientProfile, Strategy
from fedflame.training.evaluation import HeldOut


@dataclass(frozen=True)
class Server:
    """The parts of a run that stay the same in all rounds."""

    config: RunConfig
    run: Path
    strategy: Strategy
    profiles: Sequence[ClientProfile]
    """The clients that train, and what they afford, in client order."""
    scorers: Sequence[ClientProfile]
    """The clients that may be asked to score: also those that own no row to train on."""
    tiers: Sequence[int]
    """The values of k to evaluate at, largest first."""
    deployments: Sequence[tuple[int, int]]
    """Pairs of k and cut rank to evaluate at as well; see `RunConfig.cut_deployments`."""
    training_flops: Callable[[int, int], float]
    """Returns the training FLOPs per token for k and rank."""
    clients: Clients
    adapted: AdaptedModel
    held_out: HeldOut
    max_length: int
    """The most tokens of a row."""
    row_length: int
    """The mean tokens of a row, of those that the hub holds."""
    metrics: MetricsFile
    reporter: Reporter
