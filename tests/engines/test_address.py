"""An address of a server is a host and a port that there can be."""

from __future__ import annotations

import pytest

from fedflame.engines.address import host_and_port
from fedflame.errors import UserError


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("hub.example:8000", "hub.example", 8000),
        ("[::1]:1", "[::1]", 1),
        ("10.0.0.7:65535", "10.0.0.7", 65535),
    ],
)
def test_host_and_port_are_what_stands_before_and_after_the_last_colon(
    address: str, host: str, port: int
) -> None:
    assert host_and_port(address, "flower.address") == (host, port)


@pytest.mark.parametrize(
    "address",
    ["", "hub.example", "8000", ":8000", "hub.example:", "hub:0", "hub:65536", "hub:-1", "hub:http", "hub:²"],
)
def test_an_address_without_a_host_or_with_a_port_that_there_cannot_be_is_one_line(address: str) -> None:
    with pytest.raises(UserError) as refused:
        host_and_port(address, "flower.address")
    assert str(refused.value) == (
        f"flower.address = {address!r}: must be host and port, such as hub.example:8000"
    )
