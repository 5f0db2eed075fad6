"""The section on what a private run tells of a row at most."""

from __future__ import annotations

import math

from fedflame.report.charts import Series, legend, line_chart
from fedflame.report.events import Spent
from fedflame.report.markup import Markup, element, join, note, section, table
from fedflame.report.numbers import decimal, percent
from fedflame.report.records import Run

LINES = 6
"""Clients that the chart shows: those that have spent the most."""
_MEANING = (
    "Neighbours are the rows of a client with one row, or all rows of a person where the site names persons, "
    "replaced by nothing: their number is public. Epsilon bounds what all messages of the client together "
    "tell of it, whoever reads them. It is the upper bound of numerical composition (dp-accounting). Noise "
    "and sampling are as each client says; nobody else can check them. Tokens and the FLOPs of training are "
    "those to be expected of the plan, with rows as long as those that the hub holds.",
    "Clients that are simulated on this machine draw their noise from the seed, so that whoever knows the "
    "configuration can take it away. Sites draw theirs from a secret of their own.",
)
_SUMS = (
    "The updates of the clients were seen in sums only: one over all clients of a round that trained with "
    "equal k, under masks which cancel. So losses, counts and norms of single clients are not known. Tokens "
    "and the FLOPs of training are those to be expected of the plan."
)


def privacy(run: Run) -> Markup:
    """Show what a private run tells; empty for a run that was neither noised nor summed under masks."""
    config = run.config.get("privacy", {})
    parts = [note(_SUMS)] if config.get("secure_aggregation") else []
    if config.get("unit", "none") != "none":
        parts += _spent(run)
    return section("Privacy", *parts) if parts else join([])


def _spent(run: Run) -> list[Markup]:
    """Epsilon by client and round, and what it means."""
    if not run.spent:
        return [note("No private round is finished yet.")]
    last = {event.client: event for event in run.spent}
    headers = ["Client", "Epsilon", "Delta", "Noise over clip norm", "Sampled per step", "Steps"]
    rows = [_row(run, event) for _, event in sorted(last.items())]
    return [table(headers, rows), _chart(run, last), *map(note, _MEANING)]


def _row(run: Run, spent: Spent) -> list[object]:
    rate, delta = percent(spent.sampling_rate), f"{spent.delta:g}"
    return [
        run.name(spent.client),
        decimal(spent.epsilon, 2),
        delta,
        decimal(spent.noise_multiplier, 3),
        rate,
        f"{spent.steps:,}",
    ]


def _chart(run: Run, last: dict[int, Spent]) -> Markup:
    most = sorted(last, key=lambda client: (-last[client].epsilon, client))[:LINES]
    series = []
    for colour, client in enumerate(sorted(most)):
        points = [(one.round, one.epsilon) for one in run.spent if one.client == client]
        finite = [(at, epsilon) for at, epsilon in points if math.isfinite(epsilon)]
        series += [Series(run.name(client), colour, finite)] if finite else []
    if not series:
        return join([])
    label = "Epsilon after each round"
    names = legend([(f"t{line.colour}", line.label) for line in series])
    figure = element("figure", element("figcaption", label), names, line_chart(series, label))
    return element("div", figure, class_="columns")
