"""What sites say of themselves: known and believed within bounds, or the site says nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.engines.driver_here import DESCRIPTION, answer, described, driver, honest

from fedflame.wire.envelope import Envelope

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("impatient", "whole")]


def test_the_rows_to_score_are_those_that_sites_say_and_none_of_one_that_is_left_out(tmp_path: Path) -> None:
    def two_say(site: str, request: bytes) -> bytes:
        return described(request, **({"test_rows": 5} if site != "north" else {"kind": "update"}))

    with driver(two_say, tmp_path) as hub:
        hub.clients.describe()
        assert hub.clients.test_rows() == [None, 5, 5]
        hub.clients.leave_out("south", "it affords less")
        assert hub.clients.test_rows() == [None, 0, 5]


def test_a_site_that_does_not_describe_itself_costs_no_whole_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.patience.LEAST_SECONDS", 0.3)
    end = threading.Event()

    def mute(site: str, request: bytes) -> bytes:
        if site == "west":
            end.wait(20)
        return described(request)

    with driver(mute, tmp_path) as hub:
        assert sorted(hub.clients.describe()) == ["north", "south"]
        end.set()
        assert hub.heard("west: no answer within 0 s")


def test_what_sites_say_of_themselves_is_known_and_who_says_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedflame.engines.clients.ANSWER_MEMORY", 0)

    def shy_south(site: str, request: bytes) -> bytes:
        if site == "south":
            return answer(request, kind="failed", reason="ValueError: x")
        return described(request, num_examples=len(site))

    with driver(shy_south, tmp_path) as hub:
        assert hub.clients.num_examples() == [0, 0, 0], "before they are asked"
        assert set(hub.clients.describe()) == {"north", "west"}
        assert hub.clients.num_examples() == [5, 0, 4]
        assert [line for line in hub.said if not line.startswith("job")] == ["south: ValueError: x"]
    assert list(tmp_path.iterdir()) == []


def test_the_rows_of_a_site_are_believed_up_to_ten_times_the_median_also_where_it_has_not_said_them(
    tmp_path: Path,
) -> None:
    claims = {"north": 5, "south": 10**9, "west": 40}
    with driver(lambda site, request: described(request, num_examples=claims[site]), tmp_path) as hub:
        hub.clients.describe()
        assert [hub.clients.believed_rows(client) for client in range(3)] == [5, 400, 40]
        del hub.clients._known["north"]
        assert [hub.clients.believed_rows(client) for client in range(3)] == [400, 400, 40]


NO_NUMBERS = ("7", None, 7.0, True, [7], {"rows": 7}, 0, -7, 2**63, float("inf"), float("nan"))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in list(DESCRIPTION)[1:4] for value in NO_NUMBERS]
    + [("held", value) for value in (7, None, True, ["held"])]
    + [("test_rows", value) for value in (-1, 2**31, True, "7", None, 1.0)],
)
def test_a_site_that_describes_itself_in_nonsense_is_one_that_says_nothing(
    name: str, value: Any, tmp_path: Path
) -> None:
    def odd_south(site: str, request: bytes) -> bytes:
        return described(request, **({name: value} if site == "south" else {}))

    with driver(odd_south, tmp_path) as hub:
        assert set(hub.clients.describe()) == {"north", "west"}
        assert hub.clients.num_examples() == [7, 0, 7]
        assert hub.heard(f"south: its answer is refused: description.{name} = {value!r}: Input should be")


@pytest.mark.parametrize("name", list(DESCRIPTION)[1:])
def test_a_site_that_leaves_out_a_part_of_its_description_is_one_that_says_nothing(
    name: str, tmp_path: Path
) -> None:
    def silent_south(site: str, request: bytes) -> bytes:
        said = Envelope.from_bytes(described(request)).header
        return Envelope({key: said[key] for key in said if site != "south" or key != name}).to_bytes()

    with driver(silent_south, tmp_path) as hub:
        assert set(hub.clients.describe()) == {"north", "west"}
        assert hub.heard(f"south: its answer is refused: description.{name} is missing")


def test_an_update_is_no_description_and_a_description_no_update(tmp_path: Path) -> None:
    with driver(honest, tmp_path) as hub:
        assert hub.clients.describe() == {}
        assert hub.heard("south: its answer is refused: it is of kind 'update'")
        hub.engine.deliver = lambda site, request: described(request)
        assert {got.failure for got in hub.round()} == {"its answer is refused: it is of kind 'description'"}
