"""What is refused, and what is spread over all cards, by numbers of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.fake_cards import MODEL, fake_cards
from tests.tiny_models import ATTENTION

from fedflame.base.card_memory import (
    Need,
    evaluation_need,
    needs_all_cards,
    require_room,
    spread_if_needed,
    training_need,
    training_words,
)
from fedflame.base.device import ALL_CARDS, Card, DeviceChoice, choose_device
from fedflame.config.sections import AdapterConfig
from fedflame.cost.memory import least_evaluation_memory, least_training_memory
from fedflame.cost.model_shape import read_model_shape
from fedflame.errors import UserError

GB = 10**9
WORDS = "training at k = 4 with 512 tokens per batch and gradient_checkpointing = 'none'"


def need(gigabytes: float) -> Need:
    return Need(int(gigabytes * GB), "evaluating", "the base", "")


def on_card(gigabytes: int) -> DeviceChoice:
    return DeviceChoice("cuda:1", "", (Card("cuda:1", MODEL, gigabytes * GB, (9, 0)),))


@pytest.mark.parametrize(
    ("needed", "free", "expected"),
    [
        (10, [10, 10], False),
        (11, [10, 10], True),
        (20, [10, 10], True),
        (21, [10, 10], False),
        (11, [10], False),
        (11, [10, 0, 2], True),
    ],
)
def test_all_cards_are_needed_where_one_has_too_little_and_all_have_enough(
    needed: int, free: Sequence[int], expected: bool
) -> None:
    assert needs_all_cards(needed, free) == expected


def test_the_other_cards_are_not_asked_if_the_first_has_enough() -> None:
    def free() -> Iterator[int]:
        yield 10
        raise AssertionError("asking takes memory of the card")

    assert not needs_all_cards(10, free())


@pytest.mark.parametrize(
    ("wanted", "gigabytes", "name"),
    [
        ("auto", 30, "cuda:0"),
        ("auto", 31, ALL_CARDS),
        ("cuda", 70, ALL_CARDS),
        ("cuda", 71, "cuda:0"),
        ("cuda:0", 31, "cuda:0"),
        ("cpu", 31, "cpu"),
    ],
)
def test_a_base_is_spread_over_the_cards_only_where_no_card_was_named(
    wanted: str, gigabytes: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cards(monkeypatch, tmp_path, (80 * GB, 80 * GB), free=(30 * GB, 40 * GB))
    device = spread_if_needed(choose_device(wanted), need(gigabytes))
    assert device.name == name
    if name == ALL_CARDS:
        assert device.reason == (
            f"{gigabytes}.0 GB are more than one card has free; slowly: one card works at a time"
        )
        assert device.memory == 160 * GB


@pytest.mark.parametrize(("gigabytes", "copies"), [(24.1, 1), (12.1, 2)])
def test_a_card_that_cannot_hold_what_is_known_is_refused(gigabytes: float, copies: int) -> None:
    with pytest.raises(UserError, match=r"cuda:1 \(NVIDIA H200\) has 24.0 GB; take "):
        require_room(on_card(24), need(gigabytes), copies)


@pytest.mark.parametrize(("gigabytes", "copies"), [(24, 1), (12, 2)])
def test_a_card_that_holds_just_that_is_not_refused(gigabytes: float, copies: int) -> None:
    require_room(on_card(24), need(gigabytes), copies)


def test_of_a_cpu_nothing_is_required() -> None:
    require_room(DeviceChoice("cpu", ""), need(1e6))


def test_the_refusal_says_what_is_needed_for_what_and_what_takes_less(tiny_folder: Path) -> None:
    shape, adapter = read_model_shape(tiny_folder), AdapterConfig(r=4)
    trained = training_need(shape, adapter, "float32", WORDS)
    assert trained.size == least_training_memory(shape, 4, ATTENTION, "float32")
    with pytest.raises(UserError) as refused:
        require_room(on_card(1), Need(2 * GB, trained.work, trained.parts, trained.advice), 3)
    assert str(refused.value) == (
        f"{WORDS} takes at least 6.0 GB in 3 workers on a card for the base in float32 and the adapter of "
        "rank 4 with its moments, whatever k and tokens are; cuda:1 (NVIDIA H200) has 1.0 GB; take fewer "
        "workers, model.dtype = 'bfloat16', a smaller adapter.r, a card with more memory, several cards, or "
        "device = 'cpu'"
    )
    evaluated = evaluation_need(shape, adapter, "bfloat16")
    assert evaluated.size == least_evaluation_memory(shape, 4, ATTENTION, "bfloat16")
    with pytest.raises(UserError) as refused:
        require_room(on_card(1), Need(2 * GB, evaluated.work, evaluated.parts, evaluated.advice))
    assert str(refused.value) == (
        "evaluating takes at least 2.0 GB for the base in bfloat16 and the adapter, whatever k and tokens "
        "are; cuda:1 (NVIDIA H200) has 1.0 GB; take a card with more memory, several cards, or device = 'cpu'"
    )


def test_the_batch_is_in_tokens_or_in_rows() -> None:
    assert training_words(4, 512, 8, False, "none") == WORDS
    assert training_words(1, 0, 8, False, "layers") == (
        "training at k = 1 with 8 rows per batch and gradient_checkpointing = 'layers'"
    )
