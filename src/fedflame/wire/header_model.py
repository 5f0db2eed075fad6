"""What stands in the header of a request or an answer, as strict types."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from fedflame.errors import InvalidMessage


class HeaderModel(BaseModel):
    """Fields of a header. Their types are strict: text is no number, and true is no 1."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, value: Any, what: str) -> Self:
        """Read the fields. Raises InvalidMessage, which begins with `what`, at the first that is wrong."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join([what, *map(str, first["loc"])])
            if first["type"] == "missing":
                raise InvalidMessage(f"{where} is missing") from error
            raise InvalidMessage(f"{where} = {first['input']!r}: {first['msg']}") from error
