"""What is cut of a row that is too long: the answer is kept, and the oldest goes first."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.chat_templates import FAMILIES, tokenizer_of
from tests.data.encoded_rows import TOKENIZER, labelled, text
from tests.tiny_models import END

from fedflame.config.sections import DataConfig
from fedflame.data.conversations import Conversation, Turn, single_turn
from fedflame.data.encoder import new_encoder
from fedflame.data.encoding import encode, encode_prompts, encode_rows

MARKER = "\nResponse:"


def of_lengths(prompt: int, response: int) -> Conversation:
    """A row whose prompt without marker, and response with its blank and the end, have so many tokens."""
    return single_turn("x" * (prompt - len("Instruction: ")), "", "y" * (response - 2), "any")


@pytest.mark.parametrize(
    ("prompt", "response", "kept_prompt", "kept_response"),
    [
        (30, 20, 30, 20),  # 60 with the marker: fits exactly
        (31, 20, 30, 20),  # the prompt gives way
        (90, 10, 40, 10),
        (20, 35, 15, 35),
        (90, 45, 5, 45),  # three quarters: the answer is whole
        (20, 90, 5, 45),  # beyond them it gives way
        (90, 90, 5, 45),
    ],
)
def test_the_answer_is_kept_and_the_left_of_what_is_asked_gives_way(
    prompt: int, response: int, kept_prompt: int, kept_response: int
) -> None:
    original = of_lengths(prompt, response)
    row = encode(original, new_encoder(TOKENIZER, 60))
    answer = [*TOKENIZER.encode(f" {original.response}"), END][:kept_response]
    assert row.ids[row.prompt_length :] == answer
    assert row.prompt_length == kept_prompt + len(MARKER)
    whole = ("Instruction: " + "x" * (prompt - 13))[:prompt]
    kept = text(row.ids[: row.prompt_length]).removesuffix(MARKER)
    # What is asked goes before the words of the form.
    assert kept == (
        whole
        if kept_prompt == prompt
        else ("Instruction: " + "x" * (kept_prompt - 13))
        if kept_prompt >= 13
        else "Instruction: "[-kept_prompt:]
    )
    assert row.truncated == (prompt + response + len(MARKER) > 60)


def test_of_a_context_and_an_instruction_the_left_of_the_context_goes_first() -> None:
    row = encode(single_turn("Name it", "abcdefghij", "Yes", "all"), new_encoder(TOKENIZER, 48))
    assert text(row.ids[:-1]) == "Instruction: Name it\nInput: fghij\nResponse: Yes"
    assert len(row.ids) == 48 and row.truncated


@settings(deadline=None)
@given(st.integers(14, 80), st.integers(3, 80), st.integers(16, 120))
def test_no_row_is_longer_than_allowed_and_each_keeps_an_answer(
    prompt: int, response: int, max_length: int
) -> None:
    original = of_lengths(prompt, response)
    row = encode(original, new_encoder(TOKENIZER, max_length))
    assert len(row.ids) == min(max_length, prompt + len(MARKER) + response)
    assert row.prompt_length < len(row.ids)
    if response <= max_length * 3 // 4:
        assert row.ids[row.prompt_length :] == [*TOKENIZER.encode(f" {original.response}"), END]
    (start,) = encode_prompts([original], new_encoder(TOKENIZER, max_length), max_length)
    assert len(start.ids) <= max_length and text(start.ids).endswith(MARKER)
    assert start.truncated == (prompt + len(MARKER) > max_length)


EXCHANGES = tuple(
    turn for n in range(5) for turn in (Turn("user", f"Question {n}"), Turn("assistant", f"Answer {n}"))
)


@pytest.mark.parametrize("name", ["chatml", "marked", "llama3", "phi", "glm"])
@pytest.mark.parametrize("system", [True, False])
def test_the_oldest_turns_go_first_and_the_systems_turn_stays(name: str, system: bool) -> None:
    tokenizer = tokenizer_of(name)
    head = (Turn("system", "Be brief."),) if system else ()
    whole = Conversation((*head, *EXCHANGES))
    of_two = encode(Conversation((*head, *EXCHANGES[-4:])), new_encoder(tokenizer, 10_000))
    for more in (0, 5):  # the third exchange does not fit
        row = encode(whole, new_encoder(tokenizer, len(of_two.ids) + more))
        assert row == replace(of_two, truncated=True)
    of_one = encode(Conversation((*head, *EXCHANGES[-2:])), new_encoder(tokenizer, 10_000))
    row = encode(whole, new_encoder(tokenizer, len(of_two.ids) - 1))
    assert row == replace(of_one, truncated=True), "the end of the turn counts"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_answer_keeps_its_loss_whatever_is_cut(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    head = (Turn("system", "Be brief. " * 9),) if family.takes_system else ()
    turns = (
        *head,
        Turn("user", "Why? " * 40),
        Turn("assistant", "4"),
        Turn("user", "So? " * 40),
        Turn("assistant", "6"),
    )
    whole = encode(Conversation(turns), new_encoder(tokenizer, 10_000))
    for most in (200, 120, 80):
        row = encode(Conversation(turns), new_encoder(tokenizer, most))
        assert len(row.ids) <= most and row.truncated
        answer = tokenizer.encode(family.last, add_special_tokens=False)
        assert labelled(row)[-len(answer) :] == answer == labelled(whole)[-len(answer) :]
        if family.bos:
            assert row.ids[0] == tokenizer.bos_token_id
        (prompt,) = encode_prompts([Conversation(turns)], new_encoder(tokenizer, most), most)
        assert len(prompt.ids) <= most and prompt.truncated


@pytest.mark.parametrize("plain", [True, False])
def test_bos_stays_where_the_words_of_the_form_are_cut(plain: bool) -> None:
    tokenizer = tokenizer_of("llama3")
    row = single_turn("Why", "", "z" * 18, "all")
    encoder = new_encoder(tokenizer, 30, DataConfig(chat_template_path="plain" if plain else ""))
    encoded, (prompt,) = encode(row, encoder), encode_prompts([row], encoder, 12)
    assert len(encoded.ids) == 30 and len(prompt.ids) == 12
    for ids in (encoded.ids, prompt.ids):
        assert ids[0] == tokenizer.bos_token_id and "Why" not in tokenizer.decode(ids)


@pytest.mark.parametrize("most", [90, 60])
def test_the_systems_turn_goes_as_a_whole_where_not_even_the_answer_fits_beside_it(most: int) -> None:
    tokenizer = tokenizer_of("chatml")
    turns = (Turn("system", "Be brief. " * 9), Turn("user", "Why? " * 40), Turn("assistant", "Because"))
    row = encode(Conversation(turns), new_encoder(tokenizer, most))
    kept = str(tokenizer.decode(row.ids))
    assert len(row.ids) == most and "Be brief" not in kept
    assert kept.startswith("<|im_start|>user\n") and kept.endswith("assistant\nBecause<|im_end|>\n")
    assert (
        encode(Conversation(turns), new_encoder(tokenizer, 150)).ids[: len("system\nBe brief")]
        == (tokenizer.encode("<|im_start|>system\n" + "Be brief. " * 9)[: len("system\nBe brief")])
    ), "where it fits, the user's words are cut and it stays"


def test_a_long_conversation_is_cut_in_few_renderings() -> None:
    tokenizer = tokenizer_of("chatml")
    turns = tuple(
        turn for n in range(400) for turn in (Turn("user", f"Question {n}"), Turn("assistant", f"Answer {n}"))
    )
    row = encode(Conversation(turns), new_encoder(tokenizer, 200))
    assert "Answer 399" in tokenizer.decode(row.ids) and "Answer 390" not in tokenizer.decode(row.ids)


def test_a_row_without_an_answer_within_its_length_has_a_reason() -> None:
    tokenizer = tokenizer_of("chatml")
    turns = (Turn("user", "Why?"), Turn("assistant", "4"), Turn("user", "So?"), Turn("assistant", "6"))
    encoder = new_encoder(tokenizer, 1)
    assert encode_rows([Conversation(turns)], encoder) == [
        "no token of the assistant is left within data.max_length = 1"
    ]
