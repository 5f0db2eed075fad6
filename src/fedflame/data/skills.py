"""Skills: a seeded generator of short English instruction tasks with exact answers.

There are ten categories, each with two or more kinds of problems. A `Problem` is the content (kind, facts,
answer); a template turns it into an instruction. A hash of the content decides whether a problem is held out,
so a held-out problem never occurs among the training rows, in whatever wording. Validation rows are held-out
problems that the test rows of the same seed do not use.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fedflame.data.conversations import Conversation, single_turn
from fedflame.errors import UserError

Split = Literal["train", "held_out"]

NOUNS = (
    "apple ball bell bird boat book bottle box bread brush bus cake candle car cat chair clock "
    "coat cow cup desk dog door drum duck egg fish flag flower fork fox frog glass glove goat "
    "hammer hat horse house jar key kite knife ladder lamp leaf lemon letter lion map mirror "
    "monkey mouse nail needle orange owl paper pear pen pencil piano picture pig plate pot potato "
    "rabbit ring river road robot rock roof rope rose sheep ship shirt shoe shop sock spoon star "
    "stone table tent ticket tiger tooth torch tower train tree truck turtle wagon wall watch "
    "whale wheel window wolf"
).split()
IRREGULAR_PLURALS = {
    "bus": "buses", "box": "boxes", "brush": "brushes", "fish": "fish", "fox": "foxes",
    "glass": "glasses", "knife": "knives", "leaf": "leaves", "mouse": "mice", "potato": "potatoes",
    "sheep": "sheep", "tooth": "teeth", "torch": "torches", "watch": "watches", "wolf": "wolves",
}  # fmt: skip
PAST_TENSES = {
    "ask": "asked", "begin": "began", "break": "broke", "bring": "brought", "build": "built",
    "buy": "bought", "call": "called", "catch": "caught", "clean": "cleaned", "come": "came",
    "cook": "cooked", "dance": "danced", "draw": "drew", "drink": "drank", "drive": "drove",
    "eat": "ate", "fall": "fell", "feel": "felt", "find": "found", "fly": "flew", "forget": "forgot",
    "give": "gave", "go": "went", "grow": "grew", "hear": "heard", "help": "helped", "hide": "hid",
    "hold": "held", "jump": "jumped", "keep": "kept", "know": "knew", "laugh": "laughed",
    "leave": "left", "lose": "lost", "make": "made", "meet": "met", "open": "opened", "paint": "painted",
    "pay": "paid", "play": "played", "ride": "rode", "run": "ran", "say": "said", "see": "saw",
    "sell": "sold", "send": "sent", "sing": "sang", "sit": "sat", "sleep": "slept", "speak": "spoke",
    "stand": "stood", "start": "started", "swim": "swam", "take": "took", "talk": "talked",
    "teach": "taught", "tell": "told", "think": "thought", "throw": "threw", "travel": "travelled",
    "visit": "visited", "wait": "waited", "walk": "walked", "wash": "washed", "wear": "wore",
    "win": "won", "work": "worked", "write": "wrote",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("happy", "sad"),
    ("open", "closed"), ("early", "late"), ("light", "dark"), ("heavy", "weightless"),
    ("rich", "poor"), ("strong", "weak"), ("wet", "dry"), ("young", "old"), ("full", "empty"),
    ("loud", "quiet"), ("near", "far"), ("clean", "dirty"), ("hard", "soft"), ("high", "low"),
    ("thick", "thin"), ("wide", "narrow"), ("rough", "smooth"), ("sharp", "blunt"),
    ("deep", "shallow"), ("sweet", "bitter"), ("brave", "afraid"), ("cheap", "expensive"),
    ("right", "wrong"), ("safe", "dangerous"), ("simple", "complicated"), ("up", "down"),
    ("left", "right-hand"), ("inside", "outside"), ("always", "never"), ("before", "after"),
    ("day", "night"), ("summer", "winter"), ("north", "south"), ("east", "west"),
    ("friend", "enemy"),
)  # fmt: skip
NAMES = (
    "Ada Amir Anna Ben Carla Chen Clara David Dina Elena Emil Eva Farid Felix Grace Hana Hugo Ida "
    "Ivan Jack Jana Karim Kofi Lara Leo Lily Maria Max Mina Nadia Nina Noah Olga Omar Paul Petra "
    "Rosa Sam Sara Tara Tom Vera Yuki Zoe"
).split()
CITIES = (
    "Athens Berlin Boston Cairo Chicago Dublin Geneva Havana Lagos Lima Lisbon London Madrid Milan "
    "Moscow Mumbai Nairobi Oslo Paris Prague Rome Seoul Sydney Tokyo Vienna Warsaw"
).split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November December").split()
COLOURS = "black blue brown green grey orange pink purple red white yellow".split()
ORDINALS = ("first", "second", "third", "fourth")
CONVERSIONS = {
    # kind of problem -> (from, to, factor, largest count asked for)
    "metres": ("metres", "centimetres", 100, 99),
    "kilograms": ("kilograms", "grams", 1000, 99),
    "weeks": ("weeks", "days", 7, 20),
    "hours": ("hours", "minutes", 60, 12),
    "dozens": ("dozens", "items", 12, 12),
}


COMMUTATIVE = frozenset({"add", "multiply", "larger", "smaller"})
ATTEMPTS = 10_000
"""Draws after which we assume that no problem of a category is left; the rarest is one in a few hundred."""


@dataclass(frozen=True)
class Problem:
    """The content of one task, with its only right answer."""

    category: str
    kind: str
    facts: tuple[str, ...]
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether the problem is held out; one problem in eight is."""
        content = "\x1f".join((self.kind, *self.facts))
        return hashlib.blake2b(content.encode(), digest_size=1).digest()[0] % 8 == 0

    @property
    def mirrored(self) -> Problem:
        """The problem with swapped operands if that does not change the answer, else the problem itself."""
        return replace(self, facts=self.facts[::-1]) if self.kind in COMMUTATIVE else self


def belongs_to(problem: Problem, split: Split) -> bool:
    """Return whether the problem may be asked in this split.

    Addition and multiplication commute, so neither a training problem nor its mirror image may be held out.
    """
    if split == "held_out":
        return problem.held_out
    return not problem.held_out and not problem.mirrored.held_out


def arithmetic(rng: random.Random) -> Problem:
    """Sums, differences and products of small numbers."""
    kind = rng.choice(("add", "subtract", "multiply"))
    if kind == "multiply":
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        return Problem("arithmetic", kind, (str(a), str(b)), str(a * b))
    a, b = rng.randint(1, 50), rng.randint(1, 50)
    if kind == "add":
        return Problem("arithmetic", kind, (str(a), str(b)), str(a + b))
    a, b = max(a, b), min(a, b)
    return Problem("arithmetic", kind, (str(a), str(b)), str(a - b))


def comparison(rng: random.Random) -> Problem:
    """The larger or smaller of two numbers below a thousand."""
    kind = rng.choice(("larger", "smaller"))
    a, b = rng.sample(range(1, 1000), 2)
    return Problem("comparison", kind, (str(a), str(b)), str(max(a, b) if kind == "larger" else min(a, b)))


def sorting(rng: random.Random) -> Problem:
    """Three or four numbers in rising or falling order."""
    kind = rng.choice(("ascending", "descending"))
    numbers = rng.sample(range(1, 100), rng.choice((3, 4)))
    ordered = sorted(numbers, reverse=kind == "descending")
    return Problem("sorting", kind, (_join(numbers),), _join(ordered))


def words(rng: random.Random) -> Problem:
    """Letters, plural, past tense and opposite of a word."""
    kind = rng.choice(("first_letter", "last_letter", "plural", "past", "opposite"))
    if kind == "past":
        verb = rng.choice(sorted(PAST_TENSES))
        return Problem("words", kind, (verb,), PAST_TENSES[verb])
    if kind == "opposite":
        pair = rng.choice(OPPOSITES)
        word, answer = pair if rng.random() < 0.5 else pair[::-1]
        return Problem("words", kind, (word,), answer)
    noun = rng.choice(NOUNS)
    answers = {
        "first_letter": noun[0],
        "last_letter": noun[-1],
        "plural": IRREGULAR_PLURALS.get(noun, noun + "s"),
    }
    return Problem("words", kind, (noun,), answers[kind])


def extraction(rng: random.Random) -> Problem:
    """One field of a generated sentence."""
    kind = rng.choice(("who", "what", "where", "when"))
    name, noun, city, day = (rng.choice(pool) for pool in (NAMES, NOUNS, CITIES, WEEKDAYS))
    verb = rng.choice(("bought", "lost", "found", "sold", "saw"))
    sentence = f"{name} {verb} a {noun} in {city} on {day}."
    return Problem(
        "extraction", kind, (sentence,), {"who": name, "what": noun, "where": city, "when": day}[kind]
    )


def units(rng: random.Random) -> Problem:
    """A count of one unit in another."""
    kind = rng.choice(sorted(CONVERSIONS))
    source, target, factor, largest = CONVERSIONS[kind]
    count = rng.randint(2, largest)
    return Problem("units", kind, (str(count), source, target), str(count * factor))


def dates(rng: random.Random) -> Problem:
    """ISO dates to words and back."""
    kind = rng.choice(("to_iso", "from_iso", "month"))
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2030)
    iso, long = f"{year}-{month:02d}-{day:02d}", f"{day} {MONTHS[month - 1]} {year}"
    if kind == "to_iso":
        return Problem("dates", kind, (long,), iso)
    return Problem("dates", kind, (iso,), long if kind == "from_iso" else MONTHS[month - 1])


def lists(rng: random.Random) -> Problem:
    """An item of a list by its place, or the list's length."""
    kind = rng.choice(("item", "last", "length"))
    items = rng.sample(NOUNS, rng.randint(4, 6) if kind == "length" else 4)
    if kind == "item":
        position = rng.randrange(len(ORDINALS))
        return Problem("lists", kind, (_join(items), ORDINALS[position]), items[position])
    return Problem("lists", kind, (_join(items),), items[-1] if kind == "last" else str(len(items)))


def rewriting(rng: random.Random) -> Problem:
    """A phrase with a word replaced, reversed, or joined by hyphens."""
    kind = rng.choice(("replace", "reverse", "hyphens"))
    phrase = [rng.choice(COLOURS), *rng.sample(NOUNS, 2)]
    if kind == "replace":
        old, new = rng.choice(phrase), rng.choice(NOUNS)
        changed = [new if word == old else word for word in phrase]
        return Problem("rewriting", kind, (" ".join(phrase), old, new), " ".join(changed))
    answer = " ".join(phrase[::-1]) if kind == "reverse" else "-".join(phrase)
    return Problem("rewriting", kind, (" ".join(phrase),), answer)


def lookup(rng: random.Random) -> Problem:
    """A price by its item, or an item by its price, in a small table."""
    kind = rng.choice(("price_of", "costs"))
    items, prices = rng.sample(NOUNS, 3), rng.sample(range(1, 100), 3)
    table = ", ".join(f"{item} {price}" for item, price in zip(items, prices, strict=True))
    row = rng.randrange(3)
    if kind == "price_of":
        return Problem("lookup", kind, (table, items[row]), str(prices[row]))
    return Problem("lookup", kind, (table, str(prices[row])), items[row])


GENERATORS: tuple[Callable[[random.Random], Problem], ...] = (
    arithmetic, comparison, sorting, words, extraction, units, dates, lists, rewriting, lookup,
)  # fmt: skip
CATEGORIES = tuple(generator.__name__ for generator in GENERATORS)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "add": ("What is {0} plus {1}?", "Add {0} and {1}.", "Work out {0} + {1}."),
    "subtract": ("What is {0} minus {1}?", "Subtract {1} from {0}.", "Work out {0} - {1}."),
    "multiply": ("What is {0} times {1}?", "Multiply {0} by {1}.", "Work out {0} * {1}."),
    "larger": ("Which number is larger, {0} or {1}?", "Give the larger number: {0}, {1}."),
    "smaller": ("Which number is smaller, {0} or {1}?", "Give the smaller number: {0}, {1}."),
    "ascending": ("Sort these numbers from smallest to largest: {0}.", "Sort in rising order: {0}."),
    "descending": ("Sort these numbers from largest to smallest: {0}.", "Sort in falling order: {0}."),
    "first_letter": ("What is the first letter of {0}?", "Which letter does {0} begin with?"),
    "last_letter": ("What is the last letter of {0}?", "Which letter does {0} end with?"),
    "plural": ("What is the plural of {0}?", "Give the word for more than one {0}."),
    "past": ("What is the past tense of {0}?", "Put the verb {0} into the past."),
    "opposite": ("What is the opposite of {0}?", "Name the word that means the reverse of {0}."),
    "who": ("{0} Who is the sentence about?", "Name the person: {0}"),
    "what": ("{0} Which thing is it about?", "Name the thing: {0}"),
    "where": ("{0} In which city?", "Name the city: {0}"),
    "when": ("{0} On which day?", "Name the day: {0}"),
    "metres": ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}."),
    "kilograms": ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}."),
    "weeks": ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}."),
    "hours": ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}."),
    "dozens": ("How many {2} are {0} {1}?", "Convert {0} {1} to {2}."),
    "to_iso": ("Write the date {0} as year-month-day.", "Give {0} in ISO form."),
    "from_iso": ("Write the date {0} in words.", "Give {0} as day, month and year."),
    "month": ("Which month is {0} in?", "Name the month of {0}."),
    "item": ("What is the {1} item of this list: {0}?", "Give the {1} item: {0}."),
    "last": ("What is the last item of this list: {0}?", "Give the last item: {0}."),
    "length": ("How many items are in this list: {0}?", "Count the items: {0}."),
    "replace": ("Replace {1} by {2} in: {0}", "Write this with {2} in place of {1}: {0}"),
    "reverse": ("Write these words in reverse order: {0}", "Turn the word order round: {0}"),
    "hyphens": ("Join these words with hyphens: {0}", "Write with hyphens: {0}"),
    "price_of": ("Prices: {0}. What is the price of the {1}?", "From the table {0} give the price of {1}."),
    "costs": ("Prices: {0}. Which item costs {1}?", "From the table {0} name the item at {1}."),
}


def problems(
    rng: random.Random, split: Split | None = None, taken: Collection[Problem] = frozenset()
) -> Iterator[Problem]:
    """Yield problems without end, from all categories in turn; `split` None gives both splits.

    Raises:
        UserError: a category has no more problem of this split that is not in `taken`.
    """
    while True:
        for generator in GENERATORS:
            for _ in range(ATTEMPTS):
                problem = generator(rng)
                if (split is None or belongs_to(problem, split)) and problem not in taken:
                    break
            else:
                raise UserError(
                    f"skills: the test rows use up the held-out problems of {generator.__name__}; with "
                    "evaluation.split = 'validation', evaluation.rows_per_category must be lower"
                )
            yield problem


def instructions(count: int, seed: int, split: Split) -> list[Conversation]:
    """Return `count` instruction rows, balanced over `CATEGORIES`; the same seed gives the same rows."""
    return [row for _, row in _worded(count, _rng(split, seed), split)]


def validation_instructions(count: int, seed: int) -> list[Conversation]:
    """Return `count` held-out rows without the problems of `instructions(count, seed, "held_out")`.

    Raises:
        UserError: the test rows already use all held-out problems of a category.
    """
    tested = [problem for problem, _ in _worded(count, _rng("held_out", seed), "held_out")]
    taken = {*tested, *(problem.mirrored for problem in tested)}
    return [row for _, row in _worded(count, _rng("validation", seed), "held_out", taken)]


def _rng(stream: str, seed: int) -> random.Random:
    return random.Random(f"fedflame-skills-{stream}-{seed}")


def _worded(
    count: int, rng: random.Random, split: Split, taken: Collection[Problem] = frozenset()
) -> Iterator[tuple[Problem, Conversation]]:
    """Yield `count` problems, each with an instruction row that asks it."""
    for problem, _ in zip(problems(rng, split, taken), range(count), strict=False):
        text = rng.choice(TEMPLATES[problem.kind]).format(*problem.facts)
        yield problem, single_turn(text, "", problem.answer, problem.category)


def _join(items: list[int] | list[str]) -> str:
    return ", ".join(str(item) for item in items)
