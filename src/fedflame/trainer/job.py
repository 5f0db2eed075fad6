"""The settings on which hub and trainers of a run must agree: base model, adapter and encoding of rows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Dtype
from fedflame.errors import InvalidMessage


class TrainingJob(BaseModel):
    """The part of a run's configuration that clients need and that is the same in all rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model_name_or_path: str
    """The hub's name of the base model. The site's file says which model has this name at the site."""
    model_digest: str
    """The digest of the base model, from `base.files.model_digest`."""
    dtype: Dtype
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    target_modules: str
    """Attention projections, comma-separated."""
    max_length: Annotated[int, Field(ge=8)]
    """Largest number of tokens per row."""
    num_server_rounds: Annotated[int, Field(ge=1)]

    @property
    def adapter(self) -> AdapterConfig:
        """Rank, scale and attention projections of the adapter."""
        modules = tuple(name for name in self.target_modules.split(",") if name)
        return AdapterConfig(r=self.r, lora_alpha=self.lora_alpha, target_modules=modules)

    @classmethod
    def from_request(cls, value: Any) -> TrainingJob:
        """Read the job from a request. Raises InvalidMessage if a field is missing, unknown or wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["job", *map(str, first["loc"])])
            raise InvalidMessage(f"request with {where}: {first['msg']}") from error
