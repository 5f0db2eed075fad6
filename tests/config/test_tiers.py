"""What each client trains with: its experts, ranks and tokens, in turn over the clients."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedflame.config.lists import parse_integers
from fedflame.config.load import load_config


@pytest.mark.parametrize(
    ("num_clients", "active_experts", "tiers"),
    [
        (6, "4,2,1", [4, 2, 1, 4, 2, 1]),
        (5, "8, 4", [8, 4, 8, 4, 8]),
        (3, "2", [2, 2, 2]),
        (1, "1", [1]),
    ],
)
def test_tiers_are_repeated_in_turn_over_the_clients(
    num_clients: int, active_experts: str, tiers: list[int]
) -> None:
    config = load_config(
        None, [f"clients.num_clients={num_clients}", f"clients.active_experts={active_experts}"]
    )
    assert config.afforded_experts() == tiers


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", [0] * 5), ("2048", [2048] * 5), ("512, 1024", [512, 1024, 512, 1024, 512])],
)
def test_tokens_per_step_are_repeated_in_turn_over_the_clients(text: str, tokens: list[int]) -> None:
    config = load_config(None, ["clients.num_clients=5", f"training.tokens_per_step={text}"])
    assert config.tokens_per_step() == tokens


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ((), [9, 4, 2, 1, 9]),
        (("clients.ranks=5,1",), [5, 1, 5, 1, 5]),
        (("adapter.r=2",), [2, 1, 1, 1, 2]),
    ],
)
def test_ranks_are_given_or_the_share_of_the_experts_and_at_least_one(
    overrides: tuple[str, ...], ranks: list[int]
) -> None:
    config = load_config(None, ["clients.num_clients=5", "adapter.r=9", *overrides])
    assert config.afforded_ranks(8) == ranks


@pytest.mark.parametrize(
    ("overrides", "k", "ranks"),
    [
        (("strategy.name=flame",), [4, 1, 1], [8, 8, 8]),
        (("strategy.name=flame", "training.budget=compute"), [4, 4, 1], [8, 8, 8]),
        (("strategy.name=flame", "strategy.k_rotation=none"), [4, 2, 1], [8, 8, 8]),
        (("strategy.name=fedavg",), [1, 1, 1], [8, 8, 8]),
        (("strategy.name=fedavg", "strategy.active_experts=full", "strategy.rank=min"), [6, 6, 6], [1, 1, 1]),
        (("strategy.name=rolora", "strategy.active_experts=3", "strategy.rank=5"), [3, 3, 3], [5, 5, 5]),
        (("strategy.name=hetlora",), [6, 6, 6], [5, 2, 1]),
        (("strategy.name=flora", "clients.ranks=7"), [6, 6, 6], [7, 7, 7]),
    ],
)
def test_what_each_client_trains_with_on_a_model_of_six_experts_per_token(
    overrides: tuple[str, ...], k: list[int], ranks: list[int]
) -> None:
    config = load_config(None, ["clients.num_clients=3", "clients.active_experts=4,2,1", *overrides])
    assert (config.trained_experts(6, 1), config.trained_ranks(6)) == (k, ranks)
    assert config.evaluated_experts(6) == sorted({4, 2, 1, *k}, reverse=True)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("hetlora", [(8, 4), (8, 1)]), ("flexlora", [(8, 4), (8, 1)]), ("flora", []), ("flame", [])],
)
def test_cut_ranks_are_deployed_where_a_method_cuts(name: str, wanted: list[tuple[int, int]]) -> None:
    settings = (f"strategy.name={name}", "clients.num_clients=5", "clients.active_experts=8,4,1")
    assert load_config(None, [*settings, "adapter.r=9"]).cut_deployments(8) == wanted


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1))
def test_a_list_of_tiers_is_read_with_and_without_blanks(tiers: list[int]) -> None:
    assert parse_integers(",".join(map(str, tiers))) == tuple(tiers) == parse_integers(tiers)
    assert parse_integers(" , ".join(map(str, tiers))) == tuple(tiers)


@settings(deadline=None)
@given(st.text(alphabet="0123456789,.-+ eE_²٣x\n", max_size=12))
def test_any_text_is_a_list_of_positive_tiers_or_a_value_error(text: str) -> None:
    try:
        tiers = parse_integers(text)
    except ValueError as error:
        assert str(error) == 'must be integers of at least 1, such as [8, 4, 2, 1] or "8,4,2,1"'
    else:
        assert tiers and all(k >= 1 for k in tiers)
