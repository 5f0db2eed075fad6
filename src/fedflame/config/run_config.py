"""The configuration of one run as a whole, and what follows from it for clients and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field

from fedflame.config.k_rotation import KRotation, experts_of_round
from fedflame.config.lists import names_but_none
from fedflame.config.methods import METHODS, Method
from fedflame.config.privacy_section import PrivacyConfig
from fedflame.config.sections import (
    AdapterConfig,
    ClientsConfig,
    CommunicationConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ServerConfig,
    TrainingConfig,
)
from fedflame.config.settings import Section
from fedflame.config.strategy_section import StrategyConfig
from fedflame.config.words import Tracker

SCHEMA_VERSION = 1
"""Of what is kept: run folders and the results of comparisons. It grows when a default, or what a value
means, changes; a new key whose default leaves runs as they were changes nothing that is kept."""

WITHOUT = {"strategy.clip": "none", "data.max_length": 256}
"""What a run did that says nothing of a key: without a newer one, where that is not its default, or before
its default was another. So what is kept from then still says what was run, and stays readable."""

BESIDE_RESULTS = {"output_dir", "report_to", "run_name"}
"""The keys that say where results go, not what they are."""


class RunConfig(Section):
    """The whole configuration of one run. It is frozen; sections are attributes, such as `config.data.alpha`.

    `load_config` makes one from a TOML file or a dict and refuses what contradicts itself.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What all random draws come from. The same configuration on the same machine gives the same bytes."""
    output_dir: str = "runs/first-light"
    """The run folder. It receives the adapter, the metrics, the checkpoint and the report."""
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(names_but_none)] = ()
    """The trackers that the run reports each round to; each needs the extra of its name, such as
    `fedflame[wandb]`. They get the run's numbers and its configuration. Empty or `none`: none."""
    run_name: Annotated[str, Field(max_length=128)] = ""
    """What the run is called in a tracker. Empty: the name of the run folder."""
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    clients: ClientsConfig = ClientsConfig()
    training: TrainingConfig = TrainingConfig()
    strategy: StrategyConfig = StrategyConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    server: ServerConfig = ServerConfig()
    communication: CommunicationConfig = CommunicationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def method(self) -> Method:
        """The row of the configured method."""
        return METHODS[self.strategy.name]

    def afforded_experts(self) -> list[int]:
        """The k that each client affords, in client order."""
        return self._in_turn(self.clients.active_experts)

    def tokens_per_step(self) -> list[int]:
        """The tokens of each client's optimizer steps, in client order; 0 where rows count."""
        return self._in_turn(self.training.tokens_per_step or (0,))

    def _in_turn(self, cycle: Sequence[int]) -> list[int]:
        return [cycle[client % len(cycle)] for client in range(self.clients.num_clients)]

    def afforded_ranks(self, num_experts_per_tok: int) -> list[int]:
        """The LoRA rank that each client affords on a model with this K, in client order."""
        if self.clients.ranks:
            return self._in_turn(self.clients.ranks)
        return [max(1, self.adapter.r * k // num_experts_per_tok) for k in self.afforded_experts()]

    def trained_experts(self, num_experts_per_tok: int, round_number: int) -> list[int]:
        """The k that each client trains with in a round, from 1, on a model with this K, in client order."""
        afforded, rule = self.afforded_experts(), self.method.experts
        if rule == "in_turn":
            return experts_of_round(afforded, self.k_rotation(), round_number)
        if rule == "afforded":
            return afforded
        return _alike(
            "full" if rule == "full" else self.strategy.active_experts, afforded, num_experts_per_tok
        )

    def k_rotation(self) -> KRotation:
        """`strategy.k_rotation`, once `auto` has been decided."""
        if self.strategy.k_rotation != "auto":
            return self.strategy.k_rotation
        return "all" if self.training.budget == "compute" else "smaller"

    def trained_ranks(self, num_experts_per_tok: int) -> list[int]:
        """The LoRA rank that each client trains on a model with this K, in client order."""
        ranks, rule = self.afforded_ranks(num_experts_per_tok), self.method.ranks
        if rule == "afforded":
            return ranks
        return _alike("full" if rule == "full" else self.strategy.rank, ranks, self.adapter.r)

    def evaluated_experts(self, num_experts_per_tok: int) -> list[int]:
        """Every k that a client affords or trains with on a model with this K, largest first."""
        return sorted({*self.afforded_experts(), *self.trained_experts(num_experts_per_tok, 1)}, reverse=True)

    def deployed(self, num_experts_per_tok: int) -> list[tuple[int, int]]:
        """The k and rank that each client uses the global model at, on a model with this K, in client order.

        A method that runs K experts on every client gives all of them K; the others let each client run the
        k that it affords.
        """
        full, rank = num_experts_per_tok, self.adapter.r
        own = self.method.deploys == "own_ranks"
        ranks = self.afforded_ranks(full) if own else [rank] * self.clients.num_clients
        all_full = self.method.experts in ("chosen", "full") and min(self.trained_experts(full, 1)) == full
        experts = [full] * self.clients.num_clients if all_full else self.afforded_experts()
        return list(zip(experts, ranks, strict=True))

    def cut_deployments(self, num_experts_per_tok: int) -> list[tuple[int, int]]:
        """Those of `deployed` with less than the run's rank, each once, largest first."""
        deployed = self.deployed(num_experts_per_tok)
        return sorted({(k, rank) for k, rank in deployed if rank < self.adapter.r}, reverse=True)

    def warmup_rounds(self) -> float:
        """The rounds in which the learning rate rises."""
        training = self.training
        if training.warmup_steps:
            return training.warmup_steps / training.max_steps
        return training.warmup_ratio * self.server.num_server_rounds

    def is_due(self, every: int, round_number: int) -> bool:
        """Whether something that is done every so many rounds, and before and after the run, is due."""
        return round_number in (0, self.server.num_server_rounds) or (every > 0 and round_number % every == 0)

    def error_feedback(self) -> bool:
        """Whether clients keep what rounding took from an update and add it to their next one."""
        return self.communication.update_dtype != "float32" and self.method.keeps_factors

    def clients_per_round(self) -> int:
        """The clients that are sampled in each round."""
        return sampled_clients(self.server.fraction_train, self.clients.num_clients)

    def evaluating_clients(self) -> int:
        """The clients that are sampled for an evaluation on rows of their own; 0 if none are."""
        share = self.server.fraction_evaluate
        return sampled_clients(share, self.clients.num_clients) if share else 0


def sampled_clients(fraction: float, num_clients: int) -> int:
    """The clients of a round or of an evaluation, where this share of all is sampled."""
    return max(1, round(fraction * num_clients))


def _alike(chosen: str, afforded: list[int], full: int) -> list[int]:
    """`min`, `full` or a number, for every client."""
    value = {"min": min(afforded), "full": full}.get(chosen) or int(chosen)
    return [value] * len(afforded)
