"""What every trainer of a run must agree on with the hub: base model, adapter and encoding of rows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedflame.choices import Dtype
from fedflame.config import RunConfig
from fedflame.errors import InvalidMessage


class TrainingJob(BaseModel):
    """The part of a run's configuration that does not change from round to round and that clients need."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model_name_or_path: str
    """As the hub calls it; a site says in its file what it has under this name."""
    model_digest: str
    """Of `base_model.model_digest`."""
    dtype: Dtype
    r: Annotated[int, Field(ge=1)]
    lora_alpha: Annotated[float, Field(gt=0)]
    target_modules: str
    max_length: Annotated[int, Field(ge=8)]
    """Tokens per row."""
    num_server_rounds: Annotated[int, Field(ge=1)]

    @classmethod
    def of_run(cls, config: RunConfig, dtype: Dtype, digest: str) -> TrainingJob:
        """That of a run with its base in this dtype."""
        return cls(
            model_name_or_path=config.model.model_name_or_path,
            model_digest=digest,
            dtype=dtype,
            r=config.adapter.r,
            lora_alpha=config.adapter.lora_alpha,
            target_modules=config.adapter.target_modules,
            max_length=config.data.max_length,
            num_server_rounds=config.server.num_server_rounds,
        )

    @classmethod
    def from_request(cls, value: Any) -> TrainingJob:
        """From the field of a request. Raises InvalidMessage."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["job", *map(str, first["loc"])])
            raise InvalidMessage(f"request with {where}: {first['msg']}") from error
