"""The line in which something is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedflame.errors import UserError


def refusal_of(call: Callable[..., object], *given: Any, **named: Any) -> str:
    """The one line in which this call says what its user can mend."""
    with pytest.raises(UserError) as refused:
        call(*given, **named)
    line = str(refused.value)
    assert "\n" not in line
    return line
