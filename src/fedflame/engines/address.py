"""Addresses of engine servers, as they stand in files and options."""

from __future__ import annotations

from fedflame.errors import UserError


def host_and_port(address: str, what: str) -> tuple[str, int]:
    """Split `host:port`. Raises UserError if it has another form; the message calls the address `what`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"{what} = {address!r}: must be host and port, such as hub.example:8000")
    return host, int(port)
