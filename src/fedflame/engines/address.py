"""Where a server of an engine listens, as files and options name it."""

from __future__ import annotations

from fedflame.errors import UserError


def host_and_port(address: str, what: str) -> tuple[str, int]:
    """Of `host:port`. Raises UserError, which calls the address `what`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"{what} = {address!r}: must be host and port, such as hub.example:8000")
    return host, int(port)
