"""Data as its owners have it: a file for each client, a column that names it, rows of their own to score."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data.owned_files import numbered, write_texts

from fedflame.config.client_files import client_files
from fedflame.config.load import load_config
from fedflame.data.federation import Federation, load_federation
from fedflame.errors import UserError


def said(federation: Federation, client: int) -> list[str]:
    return [federation.training[index].turns[0].content for index in federation.parts[client]]


def scored(federation: Federation) -> list[str]:
    return [row.turns[0].content for row in federation.held_out]


@pytest.fixture
def silos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files of unequal size; a pattern would sort the third between the others as text."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("silo-2", 20), ("silo-10", 30), ("silo-1", 2)):
        write_texts(tmp_path / "silos" / f"{name}.jsonl", numbered(name, count))
    return tmp_path


FILES = "data.client_files=silos/*.jsonl"


def test_each_file_is_a_client_in_the_order_of_the_numbers_in_their_names(silos: Path) -> None:
    config = load_config(None, [FILES, "evaluation.rows_per_category=5"])
    assert (config.clients.num_clients, config.clients.active_experts) == (3, (8, 4, 2))
    federation = load_federation(config)
    assert federation.names == ("silo-1", "silo-2", "silo-10")
    assert federation.partition == "given"
    everything = [*numbered("silo-1", 2), *numbered("silo-2", 20), *numbered("silo-10", 30)]
    assert sorted(
        [*(text for client in range(3) for text in said(federation, client)), *scored(federation)]
    ) == (sorted(everything))
    for client, name in enumerate(federation.names):
        assert all(text.startswith(f"{name} ") for text in said(federation, client)) and said(
            federation, client
        )
    assert len(scored(federation)) == 5


def test_the_number_of_clients_follows_from_the_files_and_another_is_refused(silos: Path) -> None:
    assert load_config({"data": {"client_files": ["silos/*1*.jsonl"]}}).clients.num_clients == 2
    given = load_config(None, [FILES, "clients.num_clients=3", "clients.active_experts=8"])
    assert given.afforded_experts() == [8, 8, 8]
    with pytest.raises(UserError) as refused:
        load_config(None, [FILES, "clients.num_clients=4"])
    assert str(refused.value) == (
        "clients.num_clients = 4: data.client_files has the rows of 3 clients; leave clients.num_clients "
        "out, or give rows for each"
    )


def test_files_that_are_not_there_or_come_twice_are_refused(silos: Path) -> None:
    with pytest.raises(UserError, match=r"data\.client_files = 'other/\*\.jsonl': no such file"):
        load_config(None, ["data.client_files=other/*.jsonl"])
    with pytest.raises(
        UserError, match=r"silo-1\.jsonl is in 'silos/\*\.jsonl' and in 'silos/silo-1\.jsonl'"
    ):
        client_files(["silos/*.jsonl", "silos/silo-1.jsonl"])


def test_too_many_files_are_refused(silos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedflame.config.client_files.MOST_FILES", 2)
    with pytest.raises(UserError, match="3 files; at most 2 are possible"):
        client_files(["silos/*.jsonl"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([FILES, "data.dataset_name=x.jsonl"], "data.client_files and data.dataset_name exclude each other"),
        ([FILES, "data.client_field=ward"], "data.client_files and data.client_field exclude each other"),
        (
            ["evaluation.dataset_name=x.jsonl", "evaluation.split=validation"],
            "evaluation.dataset_name and evaluation.split exclude each other",
        ),
    ],
)
def test_two_sources_of_the_same_are_refused(silos: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


def test_files_of_one_name_in_several_folders_are_called_by_their_paths(tmp_path: Path) -> None:
    paths = [write_texts(tmp_path / ward / "rows.jsonl", numbered(ward, 10)) for ward in ("north", "south")]
    files = f"data.client_files={','.join(map(str, paths))}"
    assert load_federation(load_config(None, [files])).names == tuple(map(str, paths))


def test_a_name_with_control_characters_is_made_fit_to_print(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a\x1b[31mb.jsonl", numbered("a", 10))
    assert load_federation(load_config(None, [f"data.client_files={path}"])).names == ("a [31mb",)


def test_a_client_of_one_row_keeps_it_and_one_without_rows_owns_none(silos: Path) -> None:
    write_texts(silos / "silos" / "silo-3.jsonl", ["alone"])
    (silos / "silos" / "silo-4.jsonl").write_text("")
    config = load_config(None, [FILES, "evaluation.rows_per_category=10"])
    for seed in range(8):
        federation = load_federation(config.model_copy(update={"seed": seed}))
        assert federation.names == ("silo-1", "silo-2", "silo-3", "silo-4", "silo-10")
        assert said(federation, 2) == ["alone"]
        assert federation.parts[3] == []
        assert said(federation, 0), "at most one of its two rows is held out"


def test_what_is_given_back_is_not_scored_in_a_copy(tmp_path: Path) -> None:
    """Both rows of a client are held out; other clients have a copy of each."""
    own = write_texts(tmp_path / "a.jsonl", ["same", "too"])
    other = write_texts(tmp_path / "b.jsonl", ["same", "too", *numbered("b", 40)])
    config = load_config(None, [f"data.client_files={own},{other}", "evaluation.rows_per_category=8"])
    seen = 0
    for seed in range(60):
        federation = load_federation(config.model_copy(update={"seed": seed}))
        trained = {*said(federation, 0), *said(federation, 1)}
        assert said(federation, 0) and not trained & set(scored(federation))
        seen += {"same", "too"} <= trained
    assert seen


def test_files_without_any_row_are_one_line(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("")
    with pytest.raises(UserError, match=r"a\.jsonl and 1 more: no usable row in any"):
        load_federation(load_config(None, [f"data.client_files={tmp_path}/*.jsonl"]))
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: no column recognised"):
        load_federation(load_config(None, [f"data.client_files={tmp_path}/*.jsonl"]))


# A column that names the client


@pytest.fixture
def wards(tmp_path: Path) -> Path:
    lines = [
        write_texts(tmp_path / f"{ward}.jsonl", numbered(ward, count), ward=ward).read_text(encoding="utf-8")
        for ward, count in (("west", 12), ("east", 20), ("north", 1))
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_column_names_the_clients_in_sorted_order(wards: Path) -> None:
    settings = [f"data.dataset_name={wards}", "data.client_field=ward", "clients.num_clients=3"]
    federation = load_federation(load_config(None, [*settings, "clients.active_experts=8,4,2"]))
    assert federation.names == ("east", "north", "west") and federation.partition == "given"
    for client, ward in enumerate(federation.names):
        assert said(federation, client) and all(text.startswith(ward) for text in said(federation, client))
    assert "'ward' as client" in federation.columns[0]


def test_another_number_of_clients_than_the_column_names_is_refused_with_the_number(wards: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_federation(load_config(None, [f"data.dataset_name={wards}", "data.client_field=ward"]))
    assert str(refused.value) == (
        "data.client_field = 'ward': the rows name 3 clients ('east', 'north', 'west'); "
        "set clients.num_clients = 3"
    )
    with pytest.raises(UserError, match=r"data\.client_field = 'wrad': .* the nearest is 'ward'"):
        load_federation(load_config(None, [f"data.dataset_name={wards}", "data.client_field=wrad"]))
    with pytest.raises(UserError, match="generated rows name no client"):
        load_federation(load_config(None, ["data.client_field=ward"]))


# Rows of their own to score, and rows per client


def test_all_rows_of_a_test_file_are_scored_and_all_others_trained_on(silos: Path) -> None:
    test = write_texts(silos / "test.jsonl", numbered("test", 33))
    config = load_config(None, [FILES, f"evaluation.dataset_name={test}", "evaluation.rows_per_category=2"])
    federation = load_federation(config)
    assert scored(federation) == numbered("test", 33)
    assert len(federation.training) == 52
    assert federation.columns[-1] == f"{test}: columns read: 'instruction', 'output' as response"


def test_generated_rows_may_be_trained_on_and_others_scored(tmp_path: Path) -> None:
    test = write_texts(tmp_path / "test.jsonl", numbered("test", 3))
    federation = load_federation(load_config(None, [f"evaluation.dataset_name={test}", "data.max_rows=100"]))
    assert scored(federation) == numbered("test", 3)
    assert len(federation.training) == 100


def test_each_client_has_at_most_so_many_rows_drawn_from_its_own(silos: Path) -> None:
    whole = load_federation(load_config(None, [FILES]))
    capped = load_federation(load_config(None, [FILES, "data.max_rows_per_client=7"]))
    for client in range(3):
        assert len(said(capped, client)) == min(7, len(said(whole, client)))
        assert set(said(capped, client)) <= set(said(whole, client))
    assert len(capped.training) == sum(map(len, capped.parts))
    assert scored(capped) == scored(whole)
    assert said(capped, 2) != said(whole, 2)[:7], "drawn, not cut"
    assert load_federation(load_config(None, [FILES, "data.max_rows_per_client=1000"])) == whole
