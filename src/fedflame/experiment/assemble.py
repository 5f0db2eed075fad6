"""Load and check everything that a run or an evaluation needs, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fedflame.base.adapted import load_adapted_model
from fedflame.base.device import DeviceChoice
from fedflame.base.dtype import DtypeChoice
from fedflame.base.files import model_config_path
from fedflame.config.run_config import RunConfig
from fedflame.cost.model_shape import ModelShape, read_model_shape
from fedflame.cost.run_cost import RunCost, run_cost
from fedflame.data.federation import EncodedFederation, Federation, describe, encode_federation
from fedflame.errors import UserError
from fedflame.experiment.placement import place
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.strategies.base import ClientProfile
from fedflame.training.evaluation import HeldOut


@dataclass(frozen=True)
class Experiment:
    """Everything loaded for a configuration: model, data, costs."""

    config: RunConfig
    device: DeviceChoice
    dtype: DtypeChoice
    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape
    federation: Federation
    encoded: EncodedFederation
    cost: RunCost

    @property
    def held_out(self) -> HeldOut:
        """The rows that are scored, and how."""
        config = self.config
        return HeldOut(
            self.federation.held_out,
            self.encoded.held_out,
            self.tokenizer,
            config.data.max_length,
            config.evaluation.max_new_tokens,
        )

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
        UserError: see `place`, `load_base_model`, `AdaptedModel` and `run_cost`; rows too long for
            the model.
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
    _require_context(config, adapted.model.config)
    encoded = encode_federation(federation, tokenizer, config.data.max_length)
    cost = run_cost(config, shape, choice.name, encoded.mean_length, encoded.labelled_share)
    return Experiment(config, device, choice, adapted, tokenizer, shape, federation, encoded, cost)


def _require_context(config: RunConfig, model_config: Any) -> None:
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and config.data.max_length > context:
        raise UserError(
            f"data.max_length = {config.data.max_length}: the model's context is {context} tokens "
            "(max_position_embeddings)"
        )
