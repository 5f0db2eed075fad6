"""How deep a header may nest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedflame.errors import InvalidMessage
from fedflame.wire.header import DEEPEST, read_header


def nested(containers: int, as_lists: bool) -> Any:
    value: Any = 1
    for _ in range(containers):
        value = [0, value] if as_lists else {"0": 0, "1": value}
    return value


@pytest.mark.parametrize("as_lists", [True, False])
def test_a_header_has_at_most_so_many_levels_wherever_they_are(as_lists: bool) -> None:
    deepest = {"plain": 1, "deep": nested(DEEPEST - 1, as_lists)}
    assert read_header(json.dumps(deepest)) == deepest
    with pytest.raises(InvalidMessage, match="a header of more than 8 levels"):
        read_header(json.dumps({"plain": 1, "deep": nested(DEEPEST, as_lists)}))
