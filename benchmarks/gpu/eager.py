"""Nothing compiled, on a card, too: what the library does where a compiler is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from fedflame.moe import adapted_model, compiled


@contextmanager
def eager() -> Iterator[None]:
    """Compile nothing within the block."""
    never = {"can_compile": lambda device_type: False}
    with mock.patch.multiple(compiled, **never), mock.patch.multiple(adapted_model, **never):
        yield
