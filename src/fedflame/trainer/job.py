"""The settings on which hub and trainers of a run must agree: base model, adapter and encoding of rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Dtype
from fedflame.wire.header_model import HeaderModel


class TrainingJob(HeaderModel):
    """The part of a run's configuration that clients need and that is the same in all rounds."""

    model_config = ConfigDict(extra="forbid")

    model_name_or_path: str
    """The hub's name of the base model. The site's file says which model has this name at the site."""
    model_digest: str
    """The digest of the base model, from `base.files.model_digest`."""
    dtype: Dtype
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    use_rslora: bool
    target_modules: str
    """Attention projections, comma-separated."""
    max_length: Annotated[int, Field(ge=8)]
    """Largest number of tokens per row."""
    template_digest: Annotated[str, Field(pattern="^[0-9a-f]{0,128}$")]
    """The digest of the chat template that renders the rows; empty for the plain form."""
    assistant_only_loss: bool
    completion_only_loss: Literal["auto", "true", "false"]
    train_on_eos: bool
    num_server_rounds: Annotated[int, Field(ge=1)]

    @property
    def adapter(self) -> AdapterConfig:
        """Rank, scale and attention projections of the adapter."""
        modules = tuple(name for name in self.target_modules.split(",") if name)
        return AdapterConfig(
            r=self.r, lora_alpha=self.lora_alpha, use_rslora=self.use_rslora, target_modules=modules
        )
