"""What a site answers where it does not do what it is asked. It needs no torch."""

from __future__ import annotations

from fedflame.errors import InvalidMessage


class Refusal(InvalidMessage):
    """The site refuses a request. The message is the reason."""
