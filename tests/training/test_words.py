"""The words that ROUGE compares: rouge_score's own for English, and those of any other script."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from fedflame.training.words import AnyScript


@given(st.text(string.printable, max_size=60))
def test_ascii_text_has_the_words_that_rouge_score_gives_it(text: str) -> None:
    assert AnyScript().tokenize(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Да, конечно!", ["да", "конечно"]),
        ("你好、世界2026", ["你", "好", "世", "界", "2026"]),
        ("Der größte Löwe", ["der", "größte", "löwe"]),
        ("running_fast", ["run", "fast"]),
        ("\uff21\uff22\uff23 \ufb01ne", ["abc", "fine"]),
        ("สวัสดี", list("สวสด")),
        ("…—!", []),
    ],
)
def test_words_of_other_scripts(text: str, words: list[str]) -> None:
    found = AnyScript().tokenize(text)
    assert [word for word in found if word.isalnum()] == words


@pytest.mark.parametrize(
    ("right", "answer", "score"),
    [
        ("да, конечно", "Да, конечно", 1.0),
        ("да, конечно", "нет", 0.0),
        ("北京大学", "北京", 2 / 3),  # two of four letters, all of two
        ("café au lait", "cafe au lait", 2 / 3),
    ],
)
def test_rouge_l_by_hand(right: str, answer: str, score: float) -> None:
    scorer = RougeScorer(["rougeL"], tokenizer=AnyScript())
    assert scorer.score(right, answer)["rougeL"].fmeasure == pytest.approx(score)
