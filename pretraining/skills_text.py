"""Generate statements about the facts behind the skills tasks, in other words than the tasks use.

There is no instruction, no question and no response marker. So the base model learns that 4 + 5 = 9 and that
the plural of mouse is mice, and fine-tuning has to teach it to answer questions. Held-out problems are left
out, except facts about words, which cannot be derived from other facts.

`documents` yields single statements; most of their tokens are random facts that cannot be predicted.
`dense_documents` yields several statements about the same facts, so that most tokens can be derived. Its two
sets of writers differ in the kinds of statements that they write most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from fedflame.data.skills import (
    CITIES,
    COLOURS,
    CONVERSIONS,
    IRREGULAR_PLURALS,
    MONTHS,
    NAMES,
    NOUNS,
    OPPOSITES,
    ORDINALS,
    PAST_TENSES,
    WEEKDAYS,
    Problem,
    problems,
)

Writer = Callable[[random.Random], str]

STATEMENTS: dict[str, tuple[str, ...]] = {
    "add": ("{0} + {1} = {answer}", "{0} and {1} make {answer}.", "the sum of {0} and {1} is {answer}."),
    "subtract": (
        "{0} - {1} = {answer}",
        "{0} less {1} leaves {answer}.",
        "take {1} from {0} and {answer} is left.",
    ),
    "multiply": ("{0} * {1} = {answer}", "{0} times {1} makes {answer}.", "{0} groups of {1} hold {answer}."),
    "larger": ("of {0} and {1}, {answer} is more.", "max({0}, {1}) = {answer}"),
    "smaller": ("of {0} and {1}, {answer} is less.", "min({0}, {1}) = {answer}"),
    "ascending": ("{0} -> going up: {answer}", "sorted([{0}]) = [{answer}]"),
    "descending": ("{0} -> going down: {answer}", "sorted([{0}], reverse=True) = [{answer}]"),
    "first_letter": ("{0} starts with the letter {answer}.", "{answer} is for {0}."),
    "last_letter": ("{0} ends in the letter {answer}.", "at the end of {0} stands {answer}."),
    "plural": ("one {0}, two {answer}.", "a {0} here, many {answer} there."),
    "past": ("today they {0}, yesterday they {answer}.", "I {0} now; I {answer} then."),
    "opposite": ("not {0} but {answer}.", "{0} is the other side of {answer}."),
    "who": ("{0} It was {answer} who did it.", "{0} -> person {answer}"),
    "what": ("{0} It was the {answer}.", "{0} -> thing {answer}"),
    "where": ("{0} That was in {answer}.", "{0} -> place {answer}"),
    "when": ("{0} It happened on {answer}.", "{0} -> time {answer}"),
    "metres": ("{0} {1} = {answer} {2}", "{0} {1} is the same as {answer} {2}."),
    "kilograms": ("{0} {1} = {answer} {2}", "{0} {1} is the same as {answer} {2}."),
    "weeks": ("{0} {1} = {answer} {2}", "{0} {1} is the same as {answer} {2}."),
    "hours": ("{0} {1} = {answer} {2}", "{0} {1} is the same as {answer} {2}."),
    "dozens": ("{0} {1} = {answer} {2}", "{0} {1} is the same as {answer} {2}."),
    "to_iso": ("{0} = {answer}", "{0}, or {answer} for short."),
    "from_iso": ("{0} = {answer}", "{0} stands for {answer}."),
    "month": ("{0} lies in {answer}.", "{0} (in {answer})"),
    "item": ("{0}; {1} comes {answer}.", "in {0} the {1} is {answer}."),
    "last": ("{0}; at the end comes {answer}.", "in {0} the final one is {answer}."),
    "length": ("{0}; that makes {answer}.", "len([{0}]) = {answer}"),
    "replace": ("{0}, {1} -> {2}: {answer}", '"{0}".replace("{1}", "{2}") = "{answer}"'),
    "reverse": ("{0} <-> {answer}", "{0} backwards is {answer}."),
    "hyphens": ("{0} becomes {answer}.", '"-".join("{0}") = "{answer}"'),
    "price_of": ("{0}; {1} is sold for {answer}.", "{0}: {1} = {answer}"),
    "costs": ("{0}; for {1} one gets {answer}.", "{0}: {1} = {answer}"),
}
WORD_FACTS = frozenset({"first_letter", "last_letter", "plural", "past", "opposite"})


def documents(seed: int) -> Iterator[str]:
    """Yield short documents without end: one to twelve statements, or spelled words."""
    rng = random.Random(f"fedflame-pretraining-{seed}")
    stream = problems(rng)
    while True:
        if rng.random() < 0.03:
            yield _spelling(rng)
            continue
        wanted, lines = rng.randint(1, 12), list[str]()
        while len(lines) < wanted:
            problem = next(stream)
            if not problem.held_out or problem.kind in WORD_FACTS:
                statement = rng.choice(STATEMENTS[problem.kind])
                lines.append(statement.format(*problem.facts, answer=problem.answer))
        yield "\n".join(lines)


def _spelling(rng: random.Random) -> str:
    vocabulary = [*NOUNS, *PAST_TENSES]
    return "\n".join(f"{word}: {' '.join(word)}" for word in rng.choices(vocabulary, k=6))


def dense_documents(seed: int, writers: Mapping[Writer, float]) -> Iterator[str]:
    """Yield documents without end, whose paragraphs have several statements about the same random facts.

    All paragraphs of a document are by one writer. `writers` maps the writers to their weights.
    """
    rng = random.Random(f"fedflame-pretraining-dense-{seed}")
    while True:
        writer = rng.choices(list(writers), list(writers.values()))[0]
        yield "\n".join(writer(rng) for _ in range(rng.randint(2, 6)))


def _repeated(rng: random.Random) -> str:
    """Repeat the same words, which teaches the model to copy."""
    pool: Sequence[str] = rng.choice((NOUNS, NAMES, CITIES, [str(rng.randint(1, 999)) for _ in range(9)]))
    items = [rng.choice(pool) for _ in range(rng.randint(2, 7))]
    line = rng.choice((" ", ", ", " - ", "; ")).join(items)
    return "\n".join([line] * rng.randint(2, 3))


def _record(rng: random.Random) -> str:
    name, noun, city, day = (rng.choice(pool) for pool in (NAMES, NOUNS, CITIES, WEEKDAYS))
    sentence = f"{name} {rng.choice(('bought', 'lost', 'found', 'sold', 'saw'))} a {noun} in {city} on {day}."
    fields = [
        ("who", "person", name),
        ("what", "thing", noun),
        ("where", "place", city),
        ("when", "time", day),
    ]
    rng.shuffle(fields)
    told = [f"{label} {value}" for kind, label, value in fields if _may_tell(kind, (sentence,), value)]
    return f"{sentence} {'; '.join(told)}"


def _table(rng: random.Random) -> str:
    items, prices = rng.sample(NOUNS, 3), [str(price) for price in rng.sample(range(1, 100), 3)]
    table = ", ".join(f"{item} {price}" for item, price in zip(items, prices, strict=True))
    pairs = [("price_of", item, price) for item, price in zip(items, prices, strict=True)]
    pairs += [("costs", price, item) for item, price in zip(items, prices, strict=True)]
    rng.shuffle(pairs)
    return f"{table}: " + "; ".join(f"{a} = {b}" for kind, a, b in pairs if _may_tell(kind, (table, a), b))


def _list(rng: random.Random) -> str:
    items = rng.sample(NOUNS, 4 if rng.random() < 0.7 else rng.randint(5, 6))
    text = ", ".join(items)
    told: list[tuple[str, tuple[str, ...], str, str]] = [
        ("length", (text,), "count", str(len(items))),
        ("last", (text,), "end", items[-1]),
    ]
    if len(items) == len(ORDINALS):
        told += [("item", (text, o), o, item) for o, item in zip(ORDINALS, items, strict=True)]
    rng.shuffle(told)
    return f"{text}: " + "; ".join(
        f"{label} {v}" for kind, facts, label, v in told if _may_tell(kind, facts, v)
    )


def _phrase(rng: random.Random) -> str:
    words = [rng.choice(COLOURS), *rng.sample(NOUNS, 2)]
    phrase, old, new = " ".join(words), rng.choice(words), rng.choice(NOUNS)
    changed = " ".join(new if word == old else word for word in words)
    told = [
        ("reverse", (phrase,), "backwards", " ".join(words[::-1])),
        ("hyphens", (phrase,), "hyphens", "-".join(words)),
        ("replace", (phrase, old, new), f"{old} -> {new}", changed),
    ]
    rng.shuffle(told)
    return f"{phrase}: " + "; ".join(
        f"{label}: {v}" for kind, facts, label, v in told if _may_tell(kind, facts, v)
    )


def _order(rng: random.Random) -> str:
    if rng.random() < 0.5:
        pair = [str(number) for number in rng.sample(range(1, 1000), 2)]
        told = [("larger", "more", max(pair, key=int)), ("smaller", "less", min(pair, key=int))]
        return f"{', '.join(pair)}: " + "; ".join(
            f"{w} {v}" for kind, w, v in told if _may_tell(kind, tuple(pair), v)
        )
    numbers = rng.sample(range(1, 100), rng.choice((3, 4)))
    text, rising = ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers)))
    falling = ", ".join(map(str, sorted(numbers, reverse=True)))
    told = [("ascending", "up", rising), ("descending", "down", falling)]
    rng.shuffle(told)
    return f"{text}: " + "; ".join(f"{w} {v}" for kind, w, v in told if _may_tell(kind, (text,), v))


def _sums(rng: random.Random) -> str:
    if rng.random() < 0.3:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        told = [("multiply", x, y, f"{x} * {y}", x * y) for x, y in ((a, b), (b, a))]
    else:
        a, b = rng.randint(1, 50), rng.randint(1, 50)
        low, high = min(a, b), max(a, b)
        told = [("add", x, y, f"{x} + {y}", x + y) for x, y in ((a, b), (b, a))]
        told += [("subtract", high, low, f"{high} - {low}", high - low)]
    return ", ".join(
        f"{text} = {value}"
        for kind, x, y, text, value in told
        if _may_tell(kind, (str(x), str(y)), str(value))
    )


def _conversion(rng: random.Random) -> str:
    kind = rng.choice(sorted(CONVERSIONS))
    source, target, factor, largest = CONVERSIONS[kind]
    counts = rng.sample(range(2, largest + 1), 3)
    return ", ".join(
        f"{count} {source} = {count * factor} {target}"
        for count in counts
        if _may_tell(kind, (str(count), source, target), str(count * factor))
    )


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2030)
    iso, long = f"{year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]} {year}"
    told = [
        ("to_iso", long, f"{long} = {iso}", iso),
        ("from_iso", iso, f"{iso} = {long}", long),
        ("month", iso, f"{iso} in {MONTHS[month - 1]}", MONTHS[month - 1]),
    ]
    return ", ".join(text for kind, fact, text, value in told if _may_tell(kind, (fact,), value))


def _word(rng: random.Random) -> str:
    """Write spelling, first and last letter and plural of a noun, or a past tense, or an opposite."""
    if rng.random() < 0.5:
        noun = rng.choice(NOUNS)
        told = [f"spelled {' '.join(noun)}", f"front {noun[0]}", f"back {noun[-1]}"]
        told.append(f"many {IRREGULAR_PLURALS.get(noun, noun + 's')}")
        rng.shuffle(told)
        return f"{rng.choice(('', 'the '))}{noun}: {'; '.join(told)}"
    if rng.random() < 0.5:
        verb = rng.choice(sorted(PAST_TENSES))
        return f"{rng.choice(('', 'to '))}{verb}: yesterday {PAST_TENSES[verb]}"
    one, other = rng.choice(OPPOSITES)
    return f"{rng.choice(('', 'what is '))}{one}: not {other}; {other}: not {one}"


def _may_tell(kind: str, facts: tuple[str, ...], answer: str) -> bool:
    return not Problem("", kind, facts, answer).held_out


DENSE_WRITERS: Mapping[Writer, float] = {
    _repeated: 3, _record: 3, _table: 3, _list: 3, _phrase: 3, _order: 3, _sums: 4, _conversion: 1, _date: 2,
}  # fmt: skip
"""Writer -> weight. Sums are hardest and have the largest weight."""
HARD_WRITERS: Mapping[Writer, float] = {
    _sums: 5, _order: 4, _word: 3, _table: 4, _phrase: 4, _conversion: 2, _repeated: 1, _record: 2, _list: 2,
    _date: 2,
}  # fmt: skip
"""Writer -> weight, by the mistakes that the model still made after `DENSE_WRITERS`."""
