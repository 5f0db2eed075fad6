"""The sections on results: the headline table, loss and score over rounds, and results by category."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fedflame.config.words import BestMetric
from fedflame.report.charts import LINE_COLOURS, Series, legend, line_chart
from fedflame.report.events import ClientRound, ScoreName
from fedflame.report.markup import Markup, element, join, note, section, table
from fedflame.report.numbers import MISSING, decimal, percent, si
from fedflame.report.records import Run
from fedflame.run_files.spans import in_spans

_MOST_POINTS = 200
"""Of a line."""
SCORE_LABELS: dict[ScoreName, str] = {"exact_match": "Exact match", "rouge_l": "ROUGE-L"}
_BEST: dict[BestMetric, str] = {
    "loss": "least loss",
    "exact_match": "most exact matches",
    "rouge_l": "largest ROUGE-L",
}


def tier_colours(run: Run) -> dict[int, int]:
    """Return tier -> line colour, the same in every chart of the page."""
    return {tier: i % LINE_COLOURS for i, tier in enumerate(run.tiers())}


def headline(run: Run) -> Markup:
    """Show one row per tier: its results and its cost."""
    tiers = run.tiers()
    if not tiers:
        return section("Results by tier", note("Nothing is recorded yet."))
    score = run.score_name()
    flops = run.forward_flops()
    full = max(flops, default=None)
    headers = ["Tier", "Clients", "Response loss", SCORE_LABELS[score] if score else "Score"]
    headers += ["Forward cost / token", f"of k = {full}" if full else "of full k"]
    headers += ["Tokens trained", "Sent up", "Sent down", "Best round"]
    rows = [_headline_row(run, tier, score, flops) for tier in tiers]
    return section("Results by tier", table(headers, rows, "headline"), _headline_note(run))


def _headline_note(run: Run) -> Markup:
    text = "k is the number of experts that run per token. Loss and score are of held-out rows, "
    text += f"before training → after {the_end(run)}. The best round is that of the {_BEST[run.metric]}."
    if not run.score_name():
        text += " This run has no scores by generation."
    if run.stop:
        text += f" The run stopped after round {run.stop.round}: {run.stop.reason}."
    return note(text)


def the_end(run: Run) -> str:
    """Return the round that a result is of, in words."""
    return "the best round of each k, whose adapter is used" if run.used_rounds else "the last round measured"


def _headline_row(run: Run, tier: int, score: ScoreName | None, flops: dict[int, float]) -> list[object]:
    updates = [update for update in run.updates if update.active_experts == tier]
    cost = flops.get(tier)
    score_cell: object = MISSING
    if score:
        score_cell = change(run.before_after(score, tier), score_format(score), rising=True)
    return [
        tier_label(tier),
        sum(k == tier for k in run.clients().values()),
        change(run.before_after("loss", tier), decimal, rising=False),
        score_cell,
        si(cost, "FLOP"),
        percent(cost / flops[max(flops)]) if cost is not None else MISSING,
        si(sum(update.tokens for update in updates)),
        si(sum(update.bytes_up for update in updates), "B"),
        si(sum(update.bytes_down for update in updates), "B"),
        best_round(run, tier),
    ]


def best_round(run: Run, tier: int) -> str:
    """Format the best round of a tier: `7 of 10`; a dash where none is known."""
    last = max((end.round for end in run.rounds), default=0)
    return f"{run.best_rounds[tier]} of {last}" if last and tier in run.best_rounds else MISSING


def deployments(run: Run) -> Markup:
    """Show the results on devices that have only the first ranks of the adapter; empty if there are none."""
    places = sorted({(d.active_experts, d.rank) for d in run.deployments}, reverse=True)
    if not places:
        return join([])
    score, full = run.score_name(), max(run.forward_flops(), default=None)
    headers = ["Device", "Clients", "Response loss", SCORE_LABELS[score] if score else "Score"]
    headers += ["Forward cost / token", f"of k = {full}" if full else "of full k"]
    rows = [_deployment_row(run, k, rank, score) for k, rank in places]
    text = "This method gives these devices only the first ranks of the adapter. They run as many experts as "
    text += f"all other devices. Before training → after {the_end(run)}."
    return section("What small devices deploy", table(headers, rows, "headline"), note(text))


def _deployment_row(run: Run, k: int, rank: int, score: ScoreName | None) -> list[object]:
    flops, whole = run.forward_flops_at(k, rank), run.forward_flops()
    trained = [client.get("trained_rank") for client in run.plan.get("clients", [])]
    score_cell: object = MISSING
    if score:
        score_cell = change(run.deployed(score, k, rank), score_format(score), rising=True)
    return [
        f"{tier_label(k)}, {rank} of {run.setting('adapter', 'r')} ranks",
        trained.count(rank),
        change(run.deployed("loss", k, rank), decimal, rising=False),
        score_cell,
        si(flops, "FLOP"),
        percent(flops / whole[max(whole)]) if flops is not None else MISSING,
    ]


def tier_label(tier: int) -> str:
    """Format a tier as `k = 8`."""
    return f"k = {tier}"


def score_format(score: ScoreName) -> Callable[[float | None], str]:
    """Return the formatter of a score: a percentage for exact match, a decimal for ROUGE-L."""
    return percent if score == "exact_match" else lambda value: decimal(value, 3)


def change(
    values: tuple[float | None, float | None], show: Callable[[float | None], str], rising: bool
) -> Markup:
    """Show a measure before and after; `rising`: the larger, the better."""
    before, after = values
    mood = "after"
    if after is not None and not math.isfinite(after):
        mood += " worse"
    elif before is not None and after is not None and before != after:
        mood += " better" if (after > before) == rising else " worse"
    return join(
        [
            element("span", show(before), class_="before"),
            element("span", " → ", class_="arrow"),
            element("span", show(after), class_=mood),
        ]
    )


def charts(run: Run) -> Markup:
    """Show loss and score of every tier over the rounds, and how the clients trained."""
    score = run.score_name()
    drawn = [_chart(run, "loss", "Response loss", 1.0)]
    if score == "exact_match":
        drawn.append(_chart(run, score, "Exact match (%)", 100.0))
    elif score == "rouge_l":
        drawn.append(_chart(run, score, "ROUGE-L", 1.0))
    drawn += [_training_loss(run), _learning_rate(run)]
    figures = [figure for figure in drawn if figure]
    if not figures:
        return section("Over rounds", note("No evaluation is recorded yet."))
    return section("Over rounds", element("div", *figures, class_="columns"))


def training_loss(updates: Sequence[ClientRound]) -> float | None:
    """Return the mean loss of updates by their tokens, in nats per token; None if nobody tells it."""
    told = [(update.loss, update.tokens) for update in updates if update.loss is not None]
    tokens = sum(tokens for _, tokens in told)
    return sum(loss * tokens for loss, tokens in told) / tokens if tokens else None


def _rates(updates: Sequence[ClientRound]) -> float | None:
    rates = [update.learning_rate for update in updates if update.learning_rate is not None]
    return sum(rates) / len(rates) if rates else None


def _chart(run: Run, name: str, label: str, factor: float) -> Markup | None:
    histories = {tier: run.history(name, tier) for tier in run.tiers()}
    return _drawn(_by_tier(run, histories, factor), label, from_zero=name != "loss")


def _training_loss(run: Run) -> Markup | None:
    most = max(1, _MOST_POINTS // max(1, len(run.rounds)))
    histories = {
        tier: [p for number, updates in run.training(tier).items() for p in _within(number, updates, most)]
        for tier in run.tiers()
    }
    return _drawn(_by_tier(run, histories, 1.0), "Training loss", from_zero=False)


def _within(number: int, updates: Sequence[ClientRound], most: int) -> list[tuple[float, float]]:
    """Return the mean losses in spans of the round's steps, or of the round if a client tells no steps."""
    count = min(most, *(len(update.step_losses) for update in updates))
    if not count:
        loss = training_loss(updates)
        return [] if loss is None else [(number, loss)]
    curves = zip(*(in_spans(update.step_losses, count) for update in updates), strict=True)
    return [(number - 1 + at / count, sum(values) / len(values)) for at, values in enumerate(curves, 1)]


def _learning_rate(run: Run) -> Markup | None:
    """Draw one line where all clients of a round have the same rate."""
    histories = _history(run, _rates)
    points = sorted(set().union(*histories.values()))
    largest = max((rate for _, rate in points), default=0.0)
    if largest <= 0:
        return None
    exponent = math.floor(math.log10(largest))
    factor = 10.0**-exponent
    series = _by_tier(run, histories, factor)
    if len({number for number, _ in points}) == len(points):
        series = [Series("every k", 0, _drawable(points, factor))]
    return _drawn(series, f"Learning rate (1e{exponent})", from_zero=True)


def _history(
    run: Run, of: Callable[[Sequence[ClientRound]], float | None]
) -> dict[int, list[tuple[int, float]]]:
    """Return tier -> what the updates of each round come to."""
    found = {
        tier: [(number, of(updates)) for number, updates in run.training(tier).items()]
        for tier in run.tiers()
    }
    return {
        tier: [(number, value) for number, value in history if value is not None]
        for tier, history in found.items()
    }


def _by_tier(run: Run, histories: Mapping[int, Sequence[tuple[float, float]]], factor: float) -> list[Series]:
    colours = tier_colours(run)
    return [
        Series(tier_label(tier), colours[tier], _drawable(history, factor))
        for tier, history in histories.items()
    ]


def _drawn(series: Sequence[Series], label: str, from_zero: bool) -> Markup | None:
    shown = [line for line in series if line.points]
    if not shown:
        return None
    return element(
        "figure",
        element("figcaption", label),
        legend([(f"t{line.colour}", line.label) for line in shown]),
        line_chart(shown, label, from_zero=from_zero),
    )


def _drawable(history: Sequence[tuple[float, float]], factor: float) -> list[tuple[float, float]]:
    """Return the points that a chart can show, which has no place for a value that is not finite."""
    return [(at, factor * value) for at, value in history if math.isfinite(value)]


def categories(run: Run) -> Markup:
    """Show score and loss of every category at every tier, at the end."""
    names = list(dict.fromkeys(e.category for e in run.evaluations if e.category is not None))
    if not names:
        return section("By category", note("No evaluation by category is recorded yet."))
    parts = []
    if score := run.score_name():
        parts.append(_category_table(run, names, score, SCORE_LABELS[score], score_format(score)))
    parts.append(_category_table(run, names, "loss", "Response loss", decimal))
    explained = note(f"At {the_end(run)}; the stronger the shade, the better.")
    return section("By category", element("div", *parts, class_="columns"), explained)


def _category_table(
    run: Run, names: list[str], measure: str, title: str, show: Callable[[float | None], str]
) -> Markup:
    tiers = run.tiers()
    last = {
        (name, tier): value
        for name in names
        for tier in tiers
        if (value := run.at_the_end(tier, run.history(measure, tier, name))) is not None
    }
    finite = [value for value in last.values() if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)

    def cell(name: str, tier: int) -> Markup:
        value = last.get((name, tier))
        if value is None or not math.isfinite(value):
            return element("td", show(value))
        shade = value if measure != "loss" else (high - value) / (high - low) if high > low else 0.5
        return element("td", show(value), class_="shaded", style=f"--shade:{shade:.3f}")

    rows = [[name, *[cell(name, tier) for tier in tiers]] for name in names]
    caption = element("figcaption", title)
    return element("figure", caption, table(["Category", *map(tier_label, tiers)], rows))
