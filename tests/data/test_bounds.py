"""Who trains on which rows, and that what is held out stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedflame.config.load import load_config
from fedflame.data.bounds import trained_parts
from fedflame.data.federation import load_federation
from fedflame.errors import UserError

PARTS = [[3, 0], [], [1, 4, 2]]
SETTINGS = ["data.max_rows=90", "clients.num_clients=3", "server.fraction_evaluate=1"]
SETTINGS += ["clients.active_experts=4,2,1", "evaluation.rows_per_category=1"]


def test_one_client_has_all_rows_or_its_own() -> None:
    assert trained_parts(PARTS, "one") == [[0, 1, 2, 3, 4], [], []]
    assert trained_parts(PARTS, "2") == [[], [], [1, 4, 2]]


@pytest.mark.parametrize("who", ["one", "0", "2"])
def test_a_bound_trains_on_rows_of_the_federation_and_scores_the_same(who: str) -> None:
    whole = load_federation(load_config(None, SETTINGS))
    bound = load_federation(load_config(None, [*SETTINGS, f"data.trained_by={who}"]))
    assert bound.tests == whole.tests and bound.held_out == whole.held_out
    assert all(bound.tests) and len(bound.parts) == 3
    trained = [[bound.training[index] for index in part] for part in bound.parts]
    own = [[whole.training[index] for index in part] for part in whole.parts]
    assert trained == ([whole.training, [], []] if who == "one" else [
        rows if client == int(who) else [] for client, rows in enumerate(own)
    ])  # fmt: skip
    tested = {row.content for rows in bound.tests for row in rows}
    assert not tested & {row.content for row in bound.training}


@pytest.mark.parametrize(
    ("who", "wanted"),
    [
        ("3", "data.trained_by = 3: must be below clients.num_clients = 3"),
        ("both", "must be 'each', 'one' or"),
    ],
)
def test_a_client_that_there_is_not_is_refused(who: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        load_config(None, [*SETTINGS, f"data.trained_by={who}"])


def test_a_client_without_rows_has_no_bound(tmp_path: Path) -> None:
    rows = "".join(f'{{"instruction": "say {n}", "response": "{n}"}}\n' for n in range(20))
    for name, content in (("a", rows), ("b", "")):
        (tmp_path / f"{name}.jsonl").write_text(content)
    given = [f"data.client_files={tmp_path / '*.jsonl'}", "clients.active_experts=1"]
    assert load_federation(load_config(None, [*given, "data.trained_by=0"])).parts[1] == []
    with pytest.raises(UserError, match=r"data\.trained_by = 1: this client has no row to train on"):
        load_federation(load_config(None, [*given, "data.trained_by=1"]))
