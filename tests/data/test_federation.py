"""Training, test and validation rows of one configuration: apart from each other, and the same each time."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat_templates import byte_tokenizer
from tests.json_lines import write_lines

from fedflame.base.files import resolve_model
from fedflame.config.load import load_config
from fedflame.cost.model_shape import read_model_shape
from fedflame.cost.row_length import prompt_length, row_length
from fedflame.data.conversations import Conversation, Turn, single_turn
from fedflame.data.encoded_federation import encode_federation
from fedflame.data.encoder import Encoder, new_encoder
from fedflame.data.federation import Federation, load_federation
from fedflame.data.rows import SkippedRow
from fedflame.data.skills import CATEGORIES
from fedflame.errors import UserError


def both_splits(*overrides: str) -> tuple[Federation, Federation]:
    """The federation with `evaluation.split` test and validation."""
    test, validation = (
        load_federation(load_config(None, [*overrides, f"evaluation.split={split}"]))
        for split in ("test", "validation")
    )
    assert (validation.training, validation.parts) == (test.training, test.parts)
    return test, validation


def content(rows: list[Conversation]) -> set[tuple[str, str, str]]:
    return {(row.turns[0].content, row.turns[0].context, row.response) for row in rows}


def assert_disjoint(test: Federation, validation: Federation) -> None:
    sets = (content(test.training), content(test.held_out), content(validation.held_out))
    assert sum(map(len, sets)) == len(set.union(*sets))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.integers(1, 20))
def test_skills_splits_are_disjoint_and_of_one_size(seed: int, per_category: int) -> None:
    test, validation = both_splits(
        f"seed={seed}", f"evaluation.rows_per_category={per_category}", "data.max_rows=400"
    )
    assert_disjoint(test, validation)
    for federation in (test, validation):
        sizes = Counter(row.category for row in federation.held_out)
        assert sizes == dict.fromkeys(CATEGORIES, per_category)


def test_default_rows_are_those_that_results_were_reported_with() -> None:
    """Of the code before there were validation rows."""
    assert (
        load_federation(load_config(None, ["data.max_rows=900", "seed=7"])).digest
        == "232ae3df00d62f74d82e972e44f02151"
    )


@pytest.mark.slow
def test_skills_say_when_no_problem_is_left_to_validate_on() -> None:
    with pytest.raises(UserError) as caught:
        both_splits("evaluation.rows_per_category=1000", "data.max_rows=40")
    assert str(caught.value) == (
        "skills: the test rows use up the held-out problems of words; with evaluation.split = 'validation', "
        "evaluation.rows_per_category must be lower"
    )


def rows_file(folder: str, drawn: list[tuple[int, str]]) -> Path:
    rows = [{"instruction": str(n), "output": "x", "category": label} for n, label in drawn]
    return write_lines(Path(folder) / "rows.jsonl", rows)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from("abc")), min_size=30, max_size=120),
    st.integers(8, 25),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_file_splits_are_disjoint(
    drawn: list[tuple[int, str]], max_rows: int, per_category: int, seed: int
) -> None:
    """With copies among the rows, and categories in which the sample leaves nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = rows_file(folder, drawn)
        overrides = (
            "clients.num_clients=2",
            "clients.active_experts=4,1",
            f"seed={seed}",
            f"data.max_rows={max_rows}",
            f"evaluation.rows_per_category={per_category}",
        )
        try:
            test, validation = both_splits(f"data.dataset_name={path}", *overrides)
        except UserError as error:
            assert "too few to hold some out" in str(error) or "must leave some" in str(error)
            return
    assert_disjoint(test, validation)
    assert len(test.training) + len(test.held_out) == max_rows
    sampled = content(test.training) | content(test.held_out)
    free = Counter(label for n, label in drawn if (str(n), "", "x") not in sampled)
    sizes = Counter(row.category for row in test.held_out)
    wanted = {label: min(size, free[label]) for label, size in sizes.items() if free[label]}
    assert Counter(row.category for row in validation.held_out) == wanted


def test_validation_rows_by_hand(tmp_path: Path) -> None:
    path = rows_file(str(tmp_path), [(n, "ab"[n % 2]) for n in range(100)])
    test, validation = both_splits(
        f"data.dataset_name={path}", "data.max_rows=50", "evaluation.rows_per_category=3"
    )
    assert len(test.training) == 44
    for federation in (test, validation):
        numbers = [int(row.turns[0].content) for row in federation.held_out]
        assert numbers == sorted(numbers)
        assert Counter(row.category for row in federation.held_out) == {"a": 3, "b": 3}


def test_a_file_used_whole_has_no_validation_rows(tmp_path: Path) -> None:
    path = rows_file(str(tmp_path), [(n, "a") for n in range(40)])
    with pytest.raises(UserError) as caught:
        both_splits(f"data.dataset_name={path}")
    assert str(caught.value) == (
        f"{path}: 40 usable rows; data.max_rows = 0 must leave some of them for "
        "evaluation.split = 'validation'"
    )


# Rows that cannot be encoded


REFUSING = (
    "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not this') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def federation(*parts: str, held_out: str = "y") -> Federation:
    """A client for each part, a row for each letter; rows of `n` are refused by the template."""
    words = {"y": "yes", "n": "no"}
    rows = [
        replace(single_turn(words[letter], "", "Hi", "all"), where=f"rows:{client}.{number}")
        for client, part in enumerate(parts)
        for number, letter in enumerate(part)
    ]
    starts = [sum(map(len, parts[:client])) for client in range(len(parts))]
    indices = [list(range(start, start + len(part))) for start, part in zip(starts, parts, strict=True)]
    tested = [replace(single_turn(words[letter], "", "Hi", "all"), where="held out") for letter in held_out]
    return Federation(rows, indices, "iid", tested, [])


def encoder() -> Encoder:
    return new_encoder(byte_tokenizer("<|im_end|>", ("<|im_start|>",), jinja=REFUSING), 100)


def test_rows_that_cannot_be_encoded_are_left_out_and_skipped() -> None:
    whole = federation("yny", "yy", held_out="yn")
    encoded = encode_federation(whole, encoder(), generate=True)
    assert [len(rows) for rows in encoded.clients] == [2, 2]
    assert encoded.federation.parts == [[0, 1], [2, 3]]
    assert [row.where for row in encoded.federation.training] == [
        "rows:0.0",
        "rows:0.2",
        "rows:1.0",
        "rows:1.1",
    ]
    assert len(encoded.held_out) == len(encoded.federation.held_out) == len(encoded.prompts) == 1
    reason = "the chat template refuses it: not this"
    assert encoded.federation.skipped == [SkippedRow("rows:0.1", reason), SkippedRow("held out", reason)]
    assert whole.skipped == [], "the rows as they were loaded stay as they are"


def test_rows_to_score_that_cannot_be_encoded_are_left_out_and_skipped() -> None:
    whole = federation("yy", "yy")
    good, bad = whole.held_out[0], replace(single_turn("no", "", "Hi", "all"), where="scored")
    whole = replace(whole, tests=([good, bad], [bad], []))
    encoded = encode_federation(whole, encoder(), generate=True)
    sizes = [(len(of.rows), len(of.encoded), len(of.prompts)) for of in encoded.tests]
    assert sizes == [(1, 1, 1), (0, 0, 0), (0, 0, 0)]
    assert encoded.federation.tests == ([good], [], [])
    assert encoded.federation.skipped == [
        SkippedRow("scored", "the chat template refuses it: not this") for _ in range(2)
    ]
    assert whole.skipped == []


def test_if_all_rows_can_be_encoded_the_federation_is_the_same() -> None:
    whole = federation("yy", "y")
    assert encode_federation(whole, encoder()).federation is whole


@pytest.mark.parametrize(
    ("parts", "held_out", "reason"),
    [
        (("nny", "nnn"), "y", "5 of 7 rows cannot be used; the first, rows:0.0: the chat template "
         "refuses it: not this; change the rows, or name another data.chat_template_path"),
        (("yyyy", "n"), "y", "none of the rows of client 1 can be used; rows:1.0: the chat template "
         "refuses it: not this"),
        (("yyyy", "y"), "n", "none of the held-out rows can be used; held out: the chat template refuses "
         "it: not this"),
    ],
)  # fmt: skip
def test_too_many_rows_that_cannot_be_encoded_stop_the_run(
    parts: tuple[str, ...], held_out: str, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        encode_federation(federation(*parts, held_out=held_out), encoder())
    assert str(caught.value) == reason


def test_half_of_the_rows_may_be_left_out() -> None:
    assert len(encode_federation(federation("nny", "yy", held_out="ny"), encoder()).clients[0]) == 1


def test_rows_without_an_answer_within_max_length_stop_the_run_with_what_to_change() -> None:
    short = replace(encoder(), max_length=1)
    with pytest.raises(UserError, match=r"no token of the assistant is left .*; raise data\.max_length$"):
        encode_federation(federation("yyy"), short)


def test_the_share_of_tokens_with_loss_counts_every_turn() -> None:
    turns = (Turn("user", "2"), Turn("assistant", "4"), Turn("user", "3"), Turn("assistant", "6"))
    row = Conversation(turns)
    encoded = encode_federation(Federation([row, row], [[0], [1]], "iid", [row], []), encoder())
    # Of a row two times an answer and its end, of im_start, role, line feed, content and im_end.
    length = len(encoded.clients[0][0].ids)
    assert encoded.labelled_share == 4 / length and encoded.mean_length == length


@pytest.mark.parametrize("context", [None, 100, 5000])
def test_rows_have_as_many_tokens_as_they_need_up_to_1024_and_the_models_context(context: int | None) -> None:
    shape = replace(read_model_shape(Path(resolve_model("olmoe-tiny"))), max_position_embeddings=context)
    assert row_length(0, shape) == min(1024, context or 1024)
    assert row_length(64, shape) == 64
    assert prompt_length(30, shape) == (None if context is None else context - 30)
    if context == 100:
        with pytest.raises(UserError, match=r"data\.max_length = 101: the model's context is 100 tokens"):
            row_length(101, shape)
        with pytest.raises(
            UserError, match=r"evaluation\.max_new_tokens = 100: must be below the model's context"
        ):
            prompt_length(100, shape)
