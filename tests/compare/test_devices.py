"""Simulated time, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from fedflame.compare.devices import ClientWork, Devices, client_seconds, round_seconds

FLOPS = {8: 40.0, 2: 10.0, 1: 8.0}
"""FLOPs per trained token by k."""
DEVICES = Devices(flops_per_second=200.0, bytes_per_second=50.0)


def client(budget: int, active_experts: int, tokens: int = 100, up: int = 0, down: int = 0) -> ClientWork:
    flops = tokens * FLOPS[active_experts]
    return ClientWork(1, 0, budget, active_experts, tokens, 9.0, flops, up, down)


def test_every_device_trains_what_it_affords_in_the_same_time() -> None:
    # 100 tokens of 40 FLOPs at 200 FLOPs a second; the others are as much slower as they do less.
    assert [client_seconds(client(k, k), FLOPS, DEVICES) for k in FLOPS] == [20.0, 20.0, 20.0]


def test_a_weak_device_takes_longer_for_more_experts() -> None:
    # The device of k = 1 does 200 * 8 / 40 = 40 FLOPs a second, and k = 8 asks 4000 of it.
    assert client_seconds(client(1, 8), FLOPS, DEVICES) == 100.0
    # The strongest at k = 1: 800 at 200.
    assert client_seconds(client(8, 1), FLOPS, DEVICES) == 4.0


def test_bytes_of_both_ways_come_on_top() -> None:
    assert client_seconds(client(8, 8, up=300, down=200), FLOPS, DEVICES) == 20.0 + 500 / 50


def test_the_strongest_device_is_the_models_own_k_even_if_no_client_has_it() -> None:
    assert client_seconds(client(2, 2), FLOPS, DEVICES) == 20.0
    # Without k = 8 the same device would count as the strongest: 1000 at 200.
    assert client_seconds(client(2, 2), {2: 10.0, 1: 8.0}, DEVICES) == 5.0


def test_a_round_waits_for_its_slowest_client() -> None:
    fast, slow = client(8, 8), replace(client(1, 8), client=1)
    assert round_seconds([fast, slow], FLOPS, DEVICES) == 100.0
    assert round_seconds([], FLOPS, DEVICES) == 0.0


@pytest.mark.parametrize("values", [{"flops_per_second": 0}, {"bytes_per_second": -1}, {"latency": 1}])
def test_devices_that_make_no_sense_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Devices(**values)
