"""JSON text that any reader takes, also where a number is not finite.

JSON has no NaN and no infinity. Such a number is written as null, and the object gets one more key,
`not_finite`, that says which number is what: `{"loss": null, "not_finite": {"/loss": "NaN"}}`. The places are
JSON pointers (RFC 6901). The readers of `reading` put the numbers back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

NOT_FINITE = "not_finite"


def to_text(value: Mapping[Any, Any], indent: int | None = None) -> str:
    """Return an object as JSON text; see above for its numbers that are not finite."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        words: dict[str, str] = {}
        plain = _without(value, "", words)
        return json.dumps({**plain, NOT_FINITE: words}, indent=indent, allow_nan=False)


def put_back(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object with the numbers that `not_finite` names.

    Raises:
        ValueError: `not_finite` names a place that the object does not have, or a word that is no number.
    """
    if NOT_FINITE not in value:
        return value
    plain = {key: inner for key, inner in value.items() if key != NOT_FINITE}
    try:
        for pointer, word in value[NOT_FINITE].items():
            _put(plain, pointer, float(word))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its {NOT_FINITE} names no number of it") from error
    return plain


def _without(value: Any, place: str, words: dict[str, str]) -> Any:
    """Return the value with null for every number that is not finite; its word goes into `words`."""
    if isinstance(value, float) and not math.isfinite(value):
        words[place] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return None
    if isinstance(value, Mapping):
        return {key: _without(inner, f"{place}/{_escaped(key)}", words) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without(inner, f"{place}/{index}", words) for index, inner in enumerate(value)]
    return value


def _escaped(key: object) -> str:
    return str(key).replace("~", "~0").replace("/", "~1")


def _put(value: Any, pointer: str, number: float) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
    for part in parents:
        value = value[int(part) if isinstance(value, list) else part]
    place = int(last) if isinstance(value, list) else last
    if value[place] is not None or math.isfinite(number):
        raise ValueError(pointer)
    value[place] = number
