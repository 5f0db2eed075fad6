from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime

import pytest

from fedflame.data.conversations import Conversation
from fedflame.data.skills import (
    CATEGORIES,
    GENERATORS,
    IRREGULAR_PLURALS,
    NOUNS,
    OPPOSITES,
    PAST_TENSES,
    TEMPLATES,
    Problem,
    Split,
    instructions,
    problems,
)

# The oracle: every kind of question as it is worded, and its answer worked out from the text alone.

SENTENCE = r"((\w+) (?:bought|lost|found|sold|saw) a (\w+) in (\w+) on (\w+)\.)"
UNIT_PAIRS = (
    ("metres", "centimetres"), ("kilograms", "grams"), ("weeks", "days"), ("hours", "minutes"),
    ("dozens", "items"),
)  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


def long_date(iso: str) -> str:
    moment = datetime.strptime(iso, "%Y-%m-%d")
    return f"{moment.day} {moment:%B} {moment.year}"


def convert(count: str, source: str, target: str) -> str:
    per = {"metres": 100, "kilograms": 1000, "weeks": 7, "hours": 60, "dozens": 12}[source]
    assert (source, target) in UNIT_PAIRS
    return str(per * int(count))


def prices(table: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+) (\d+)", table))


def item_at(ordinal: str, items: str) -> str:
    return items.split(", ")[["first", "second", "third", "fourth"].index(ordinal)]


def replaced(phrase: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, phrase)


ORACLE: tuple[tuple[str, str, Callable[..., str]], ...] = (
    ("arithmetic", r"(?:What is|Work out) (\d+) (?:plus|\+) (\d+)[?.]", lambda a, b: str(int(a) + int(b))),
    ("arithmetic", r"Add (\d+) and (\d+)\.", lambda a, b: str(int(a) + int(b))),
    ("arithmetic", r"(?:What is|Work out) (\d+) (?:minus|-) (\d+)[?.]", lambda a, b: str(int(a) - int(b))),
    ("arithmetic", r"Subtract (\d+) from (\d+)\.", lambda b, a: str(int(a) - int(b))),
    ("arithmetic", r"(?:What is|Work out) (\d+) (?:times|\*) (\d+)[?.]", lambda a, b: str(int(a) * int(b))),
    ("arithmetic", r"Multiply (\d+) by (\d+)\.", lambda a, b: str(int(a) * int(b))),
    ("comparison", r"Which number is larger, (\d+) or (\d+)\?", lambda *pair: max(pair, key=int)),
    ("comparison", r"Give the larger number: (\d+), (\d+)\.", lambda *pair: max(pair, key=int)),
    ("comparison", r"Which number is smaller, (\d+) or (\d+)\?", lambda *pair: min(pair, key=int)),
    ("comparison", r"Give the smaller number: (\d+), (\d+)\.", lambda *pair: min(pair, key=int)),
    (
        "sorting",
        r"Sort (?:these numbers from smallest to largest|in rising order): ([\d, ]+)\.",
        lambda values: listed(sorted(numbers(values))),
    ),
    (
        "sorting",
        r"Sort (?:these numbers from largest to smallest|in falling order): ([\d, ]+)\.",
        lambda values: listed(sorted(numbers(values))[::-1]),
    ),
    ("words", r"What is the first letter of (\w+)\?", lambda word: word[:1]),
    ("words", r"Which letter does (\w+) begin with\?", lambda word: word[:1]),
    ("words", r"What is the last letter of (\w+)\?", lambda word: word[-1:]),
    ("words", r"Which letter does (\w+) end with\?", lambda word: word[-1:]),
    ("extraction", rf"{SENTENCE} Who is the sentence about\?", lambda _, who, *__: who),
    ("extraction", rf"Name the person: {SENTENCE}", lambda _, who, *__: who),
    ("extraction", rf"{SENTENCE} Which thing is it about\?", lambda *parts: parts[2]),
    ("extraction", rf"Name the thing: {SENTENCE}", lambda *parts: parts[2]),
    ("extraction", rf"{SENTENCE} In which city\?", lambda *parts: parts[3]),
    ("extraction", rf"Name the city: {SENTENCE}", lambda *parts: parts[3]),
    ("extraction", rf"{SENTENCE} On which day\?", lambda *parts: parts[4]),
    ("extraction", rf"Name the day: {SENTENCE}", lambda *parts: parts[4]),
    (
        "units",
        r"How many (\w+) are (\d+) (\w+)\?",
        lambda target, count, source: convert(count, source, target),
    ),
    ("units", r"Convert (\d+) (\w+) to (\w+)\.", convert),
    (
        "dates",
        r"(?:Write the date|Give) (\d+ \w+ \d+) (?:as year-month-day|in ISO form)\.",
        lambda long: datetime.strptime(long, "%d %B %Y").date().isoformat(),
    ),
    ("dates", r"(?:Write the date|Give) (\S+) (?:in words|as day, month and year)\.", long_date),
    (
        "dates",
        r"(?:Which month is|Name the month of) ([\d-]+)(?: in\?|\.)",
        lambda iso: long_date(iso).split()[1],
    ),
    ("lists", r"What is the (first|second|third|fourth) item of this list: (.+)\?", item_at),
    ("lists", r"Give the (first|second|third|fourth) item: (.+)\.", item_at),
    (
        "lists",
        r"(?:What is|Give) the last item(?: of this list)?: (.+)[?.]",
        lambda items: items.split(", ")[-1],
    ),
    (
        "lists",
        r"(?:How many items are in this list|Count the items): (.+)[?.]",
        lambda items: str(items.count(",") + 1),
    ),
    ("rewriting", r"Replace (\w+) by (\w+) in: (.+)", lambda old, new, phrase: replaced(phrase, old, new)),
    (
        "rewriting",
        r"Write this with (\w+) in place of (\w+): (.+)",
        lambda new, old, phrase: replaced(phrase, old, new),
    ),
    (
        "rewriting",
        r"(?:Write these words in reverse order|Turn the word order round): (\w+) (\w+) (\w+)",
        lambda a, b, c: f"{c} {b} {a}",
    ),
    (
        "rewriting",
        r"(?:Join these words with hyphens|Write with hyphens): (.+)",
        lambda phrase: phrase.replace(" ", "-"),
    ),
    ("lookup", r"Prices: (.+)\. What is the price of the (\w+)\?", lambda table, item: prices(table)[item]),
    ("lookup", r"From the table (.+) give the price of (\w+)\.", lambda table, item: prices(table)[item]),
    (
        "lookup",
        r"(?:Prices:|From the table) (.+?)\.? (?:Which item costs|name the item at) (\d+)[?.]",
        lambda table, price: {cost: item for item, cost in prices(table).items()}[price],
    ),
)
# Words whose answers are facts of English, checked by hand below.
ENGLISH = (
    r"What is the (plural|past tense|opposite) of [\w-]+\?|Give the word for more than one \w+\."
    r"|Put the verb \w+ into the past\.|Name the word that means the reverse of [\w-]+\."
)


def oracle(row: Conversation) -> str | None:
    """The answer to the row's question; None for a fact of English."""
    if row.category == "words" and re.fullmatch(ENGLISH, row.turns[0].content):
        return None
    answers = []
    for category, pattern, answer in ORACLE:
        found = re.fullmatch(pattern, row.turns[0].content) if category == row.category else None
        if found:
            answers.append(answer(*found.groups()))
    assert len(answers) == 1, f"{row.turns[0].content!r} is read in {len(answers)} ways"
    return answers[0]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_agree_with_an_oracle_that_reads_the_question(split: Split) -> None:
    checked: Counter[str] = Counter()
    for row in instructions(10_000, 11, split):
        expected = oracle(row)
        if expected is not None:
            assert row.response == expected, row.turns[0].content
            checked[row.category] += 1
    assert set(checked) == set(CATEGORIES)
    assert all(checked[category] == 1000 for category in CATEGORIES if category != "words")
    assert checked["words"] > 200


@pytest.mark.parametrize(
    ("kind", "word", "answer"),
    [
        ("plural", "cat", "cats"),
        ("plural", "knife", "knives"),
        ("plural", "piano", "pianos"),
        ("plural", "box", "boxes"),
        ("past", "go", "went"),
        ("past", "dance", "danced"),
        ("opposite", "hot", "cold"),
        ("opposite", "cold", "hot"),
    ],
)
def test_facts_of_english(kind: str, word: str, answer: str) -> None:
    found = {
        problem.answer
        for problem, _ in zip(problems(random.Random(0)), range(60_000), strict=False)
        if (problem.kind, problem.facts) == (kind, (word,))
    }
    assert found == {answer}


def test_word_pools_have_one_answer_each() -> None:
    words = [word for pair in OPPOSITES for word in pair]
    assert len(set(words)) == len(words)
    assert len(set(NOUNS)) == len(NOUNS)
    assert set(IRREGULAR_PLURALS) <= set(NOUNS)
    regular = [noun for noun in NOUNS if noun not in IRREGULAR_PLURALS]
    assert not [noun for noun in regular if re.search(r"(s|x|z|ch|sh|[^aeiou]y|fe|lf|af)$", noun)]
    regular_verbs = [(verb, past) for verb, past in PAST_TENSES.items() if past.endswith("ed")]
    assert all(past in (verb + "ed", verb + "d", verb + "led") for verb, past in regular_verbs)


def test_the_same_question_has_the_same_answer() -> None:
    answers: dict[str, str] = {}
    for row in instructions(20_000, 2, "train"):
        assert answers.setdefault(row.turns[0].content, row.response) == row.response


def test_rows_are_seeded_and_touch_no_global_generator() -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    rows = instructions(300, 5, "train")
    assert random.random() == expected
    assert rows == instructions(300, 5, "train")
    assert rows != instructions(300, 6, "train")
    assert rows[:120] == instructions(120, 5, "train")


def test_known_rows() -> None:
    """Fixed for all machines and Python versions: results are reported by seed."""
    assert [(row.turns[0].content, row.response) for row in instructions(3, 0, "train")] == [
        ("Add 50 and 13.", "63"),
        ("Give the smaller number: 768, 294.", "294"),
        ("Sort in falling order: 62, 52, 22.", "62, 52, 22"),
    ]


def test_categories_are_balanced_and_nothing_is_empty() -> None:
    for split in ("train", "held_out"):
        rows = instructions(5000, 1, split)
        assert Counter(row.category for row in rows) == dict.fromkeys(CATEGORIES, 500)
        assert all(
            row.turns[0].content.strip() and row.response.strip() and row.turns[0].context == ""
            for row in rows
        )
        assert not [row for row in rows if re.search(r"[{}]", row.turns[0].content)]
    assert Counter(row.category for row in instructions(7, 1, "train")) == dict.fromkeys(CATEGORIES[:7], 1)


def content(problem: Problem) -> tuple[str, ...]:
    return (problem.kind, *problem.facts)


def test_train_and_held_out_share_no_content() -> None:
    train = {content(p) for p, _ in zip(problems(random.Random(1), "train"), range(5000), strict=False)}
    held = {content(p) for p, _ in zip(problems(random.Random(1), "held_out"), range(5000), strict=False)}
    assert len(train) > 3000 and len(held) > 1500
    assert not train & held
    questions = {row.turns[0].content for row in instructions(5000, 1, "train")}
    assert not questions & {row.turns[0].content for row in instructions(5000, 1, "held_out")}


def test_an_eighth_of_every_category_is_held_out() -> None:
    rng = random.Random(0)
    for generator in GENERATORS:
        distinct = {content(problem): problem.held_out for problem in (generator(rng) for _ in range(4000))}
        share = sum(distinct.values()) / len(distinct)
        assert 0.04 < share < 0.25, generator.__name__


def test_every_kind_has_templates_and_every_template_uses_the_facts() -> None:
    seen = {p.kind: p.facts for p, _ in zip(problems(random.Random(0)), range(3000), strict=False)}
    assert set(seen) == set(TEMPLATES)
    for kind, facts in seen.items():
        for template in TEMPLATES[kind]:
            text = template.format(*facts)
            assert all(fact in text for fact in facts), (kind, template)
