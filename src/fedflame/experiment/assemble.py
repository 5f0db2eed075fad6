"""Load and check everything that a run or an evaluation needs, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedflame.base.adapted import load_adapted_model
from fedflame.base.device import DeviceChoice
from fedflame.base.dtype import DtypeChoice
from fedflame.base.files import model_config_path
from fedflame.config.run_config import RunConfig
from fedflame.cost.model_shape import ModelShape, read_model_shape
from fedflame.cost.row_length import prompt_length, row_length
from fedflame.cost.run_cost import RunCost, run_cost
from fedflame.data.encoded_federation import EncodedFederation, encode_federation
from fedflame.data.encoder import Encoder, new_encoder
from fedflame.data.federation import Federation, describe
from fedflame.experiment.placement import place
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ClientProfile
from fedflame.training.evaluation import HeldOut
from fedflame.training.score_tests import rows_to_score


@dataclass(frozen=True)
class Experiment:
    """Everything loaded for a configuration: model, data, costs."""

    config: RunConfig
    device: DeviceChoice
    dtype: DtypeChoice
    adapted: AdaptedModel
    encoder: Encoder
    shape: ModelShape
    encoded: EncodedFederation

    @cached_property
    def cost(self) -> RunCost:
        """What the run costs."""
        rows = [len(part) for part in self.federation.parts]
        setting = self.encoded.mean_length, self.encoded.labelled_share, rows
        return run_cost(self.config, self.shape, self.dtype.name, *setting)

    @property
    def federation(self) -> Federation:
        """The rows that are used."""
        return self.encoded.federation

    @property
    def held_out(self) -> HeldOut:
        """The rows that are scored, and how."""
        config = self.config
        return HeldOut(
            self.federation.held_out,
            self.encoded.held_out,
            self.encoded.prompts,
            self.encoder,
            config.evaluation.max_new_tokens,
        )

    @property
    def tests(self) -> list[HeldOut]:
        """The rows that each client is scored on; none if no client is asked to score."""
        return [rows_to_score(tests, self.encoder) for tests in self.encoded.tests]

    @property
    def clients(self) -> list[dict[str, Any]]:
        """By client: its k, its rows and its rows by category."""
        return describe(self.federation, self.config.afforded_experts())

    @property
    def profiles(self) -> list[ClientProfile]:
        """What the server knows of each client, in client order."""
        ranks = self.config.afforded_ranks(self.adapted.num_experts_per_tok)
        budgets = zip(self.config.afforded_experts(), ranks, self.federation.parts, strict=True)
        return [ClientProfile(client, k, r, len(part)) for client, (k, r, part) in enumerate(budgets)]


def assemble(
    config: RunConfig,
    federation: Federation,
    dtype: DtypeChoice | None = None,
    workers: int = 0,
) -> Experiment:
    """Load and check what the configuration names.

    Args:
        config: what to load; see `require_runnable`.
        federation: the rows, by client.
        dtype: of the frozen base; None for what `model.dtype` says.
        workers: processes that train, each with a base of its own; 0 if nothing is trained here.

    Raises:
        UserError: see `place`, `load_base_model`, `AdaptedModel` and `encode_federation`.
    """
    shape = read_model_shape(model_config_path(config.model.model_name_or_path))
    device, choice = place(config, shape, dtype, workers)
    adapted, tokenizer = load_adapted_model(
        config.model.model_name_or_path,
        choice.name,
        config.adapter,
        config.training.gradient_checkpointing,
        device.name,
    )
    encoder = new_encoder(tokenizer, row_length(config.data.max_length, shape), config.data)
    answer = config.evaluation.max_new_tokens
    encoded = encode_federation(federation, encoder, prompt_length(answer, shape), answer > 0)
    encoded.require_known_ids(adapted.vocabulary, encoder)
    return Experiment(config, device, choice, adapted, encoder, shape, encoded)
