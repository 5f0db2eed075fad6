"""Values of settings that are a word or a number, and how they are checked."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from fedflame.config.lists import is_integer


def _min_full_or_number(value: object) -> str:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not (text in ("min", "full") or (is_integer(text) and int(text) >= 1)):
        raise ValueError("must be 'min', 'full' or an integer of at least 1")
    return text


def _median_none_or_number(value: object) -> str:
    if value in ("median", "none"):
        return str(value)
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError("must be 'median', 'none' or a number above 0")
    return f"{number:g}"


def _public_keys(keys: dict[str, str]) -> dict[str, str]:
    for name, key in keys.items():
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise ValueError(
                f"must be keys of 64 hexadecimal digits, as `fedflame site check` shows them; {name} has "
                f"{key!r}"
            )
    return keys


def _auto_or_truth(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool | str) else ""
    if text not in ("auto", "true", "false"):
        raise ValueError("must be 'auto', true or false")
    return text


def _nothing_or_a_length(value: int) -> int:
    if 0 < value < 8:
        raise ValueError("must be 0 or at least 8")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", value):
        raise ValueError("must be 'auto', 'cpu', 'cuda' or a card such as 'cuda:1'")
    return value


def _each_one_or_a_client(value: object) -> str:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not (text in ("each", "one") or re.fullmatch("0|[1-9][0-9]{0,5}", text)):
        raise ValueError("must be 'each', 'one' or the number of a client, from 0")
    return text


MinFullOrNumber = Annotated[str, BeforeValidator(_min_full_or_number)]
MedianNoneOrNumber = Annotated[str, BeforeValidator(_median_none_or_number)]
Device = Annotated[str, AfterValidator(_device)]
PublicKeys = Annotated[dict[str, str], AfterValidator(_public_keys)]
CompletionOnly = Annotated[Literal["auto", "true", "false"], BeforeValidator(_auto_or_truth)]
TrainedBy = Annotated[str, BeforeValidator(_each_one_or_a_client)]
NothingOrALength = Annotated[int, Field(ge=0, le=1_048_576), AfterValidator(_nothing_or_a_length)]
