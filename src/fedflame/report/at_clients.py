"""The section on what clients told of the global model on rows of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedflame.report.charts import Series, legend, line_chart
from fedflame.report.markup import Markup, element, join, note, section, table
from fedflame.report.measured import ClientScore, TierScore
from fedflame.report.numbers import MISSING, decimal, plural
from fedflame.report.records import Run
from fedflame.report.results import SCORE_LABELS, change, score_format, the_end, tier_colours, tier_label

_SHOWN = 20
"""Of the answers that were left out."""


def at_clients(run: Run) -> Markup:
    """Show loss and score at the clients, by tier and by client; empty if no client was asked."""
    if not run.client_scores and not run.score_exclusions:
        return join([])
    text = (
        "Each client scores the model as it deploys it, on rows that nobody trains on and that do not leave "
    )
    text += f"it. It tells sums, which nobody can check. Before training → after {the_end(run)}."
    parts = [_tiers(run), _chart(run), _clients(run), _excluded(run)]
    return section("At the clients", *parts, note(text))


def _tiers(run: Run) -> Markup:
    score = run.score_name()
    headers = ["Tier", "Clients", "Rows", "Loss at the clients", "Loss at the hub"]
    headers += [f"{SCORE_LABELS[score]} at the clients"] if score else []
    rows = []
    for k, rank in sorted({(one.active_experts, one.rank) for one in run.client_scores}, reverse=True):
        told = [one for one in run.tier_scores if (one.active_experts, one.rank) == (k, rank)]
        shown = run.at_the_end(k, [(one.round, one) for one in told])
        cut = rank < int(run.setting("adapter", "r"))
        hub = run.deployed("loss", k, rank) if cut else run.before_after("loss", k)
        row: list[object] = [
            f"{tier_label(k)}, {rank} ranks" if cut else tier_label(k),
            shown.clients if shown else MISSING,
            f"{shown.rows:,}" if shown else MISSING,
            change(_before_after(run, k, told, "loss"), decimal, rising=False),
            change(hub, decimal, rising=False),
        ]
        if score:
            row.append(change(_before_after(run, k, told, score), score_format(score), rising=True))
        rows.append(row)
    return table(headers, rows, "headline") if rows else join([])


def _clients(run: Run) -> Markup:
    score = run.score_name()
    headers = ["Client", "k", "Rows", "Times asked", "Loss"] + ([SCORE_LABELS[score]] if score else [])
    rows = []
    for client in sorted({one.client for one in run.client_scores}):
        told = [one for one in run.client_scores if one.client == client]
        asked = len(told) + sum(one.client == client for one in run.score_exclusions)
        k = told[-1].active_experts
        loss = change(_before_after(run, k, told, "loss"), decimal, rising=False)
        row: list[object] = [run.name(client), k, f"{told[-1].rows:,}", asked, loss]
        if score:
            row.append(change(_before_after(run, k, told, score), score_format(score), rising=True))
        rows.append(row)
    return table(headers, rows) if rows else join([])


def _before_after(
    run: Run, k: int, told: Sequence[ClientScore | TierScore], name: str
) -> tuple[float | None, float | None]:
    """Return a measure before training and at the end; None if it was not taken then."""
    history = [(one.round, value) for one in told if (value := one.value(name)) is not None]
    return run.start_and_end(k, sorted(history))


def _chart(run: Run) -> Markup:
    """Draw the loss of each tier at the clients, and beside it the hub's."""
    colours, full = tier_colours(run), int(run.setting("adapter", "r"))
    tiers = sorted({one.active_experts for one in run.client_scores if one.rank == full}, reverse=True)
    own = {
        k: [
            (one.round, one.loss)
            for one in run.tier_scores
            if (one.active_experts, one.rank) == (k, full) and one.loss is not None
        ]
        for k in tiers
    }
    figures = [
        _figure(f"Response loss at the {where}", {tier: points[tier] for tier in tiers}, colours)
        for where, points in (("clients", own), ("hub", {k: run.history("loss", k) for k in tiers}))
    ]
    return element("div", *[figure for figure in figures if figure], class_="columns")


def _figure(label: str, points: dict[int, list[tuple[int, float]]], colours: dict[int, int]) -> Markup | None:
    series = [
        Series(tier_label(k), colours[k], [(at, loss) for at, loss in of if math.isfinite(loss)])
        for k, of in points.items()
    ]
    shown = [line for line in series if line.points]
    if not shown:
        return None
    names = legend([(f"t{line.colour}", line.label) for line in shown])
    return element("figure", element("figcaption", label), names, line_chart(shown, label))


def _excluded(run: Run) -> Markup:
    left_out = run.score_exclusions
    if not left_out:
        return join([])
    rows = [[one.round, run.name(one.client), one.reason] for one in left_out[-_SHOWN:]]
    shown = table(["Round", "Client", "Left out of the sums because"], rows, "rounds")
    return join([shown, note(f"{plural(len(left_out), 'answer')} left out in all.")])
