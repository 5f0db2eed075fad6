"""The section on the size of updates: how far each client went, and who went much further than the others."""

from __future__ import annotations

from statistics import median

from fedflame.report.events import ClientRound, Outlier
from fedflame.report.markup import Markup, element, join, note, section, table
from fedflame.report.numbers import MISSING, decimal
from fedflame.report.records import Run

_KINDS = ("A1", "B1", "A2", "B2", "attention", "rescaler")


def updates(run: Run) -> Markup:
    """Show the norms and the pace of each client's updates, with a warning for each outlier."""
    measured = [update for update in run.updates if update.pace is not None]
    if not measured:
        return section("Size of updates", note("No update is measured yet."))
    clients = {client: [one for one in measured if one.client == client] for client in run.clients()}
    rows = [_row(run, client, of_client) for client, of_client in clients.items()]
    headers = ["Client", "k", *_KINDS, "Pace, median", "largest", "Scaled down"]
    text = "L2 norm of what a round moved, by kind of value: the largest of all rounds. The pace is the root "
    text += (
        "mean square of what values moved, over learning rate times the root of the steps; honest ones are "
    )
    text += "alike."
    warnings = [_warning(run, outlier) for outlier in run.outliers]
    return section("Size of updates", table(headers, rows), note(text), join(warnings))


def _row(run: Run, client: int, of_client: list[ClientRound]) -> list[object]:
    k = run.clients()[client]
    if not of_client:
        return [run.name(client), k, *[MISSING] * (len(_KINDS) + 3)]
    paces = [update.pace for update in of_client if update.pace is not None]
    largest = [max(update.norms.get(kind, 0.0) for update in of_client) for kind in _KINDS]
    clipped = sum(event.client == client for event in run.clippings)
    return [
        run.name(client),
        k,
        *(decimal(norm, 3) for norm in largest),
        decimal(median(paces)),
        decimal(max(paces)),
        f"{clipped} of {len(of_client)}",
    ]


def _warning(run: Run, outlier: Outlier) -> Markup:
    text = f"Warning: {run.name(outlier.client)} went {outlier.times:.1f} times as far as the median client "
    text += f"of round {outlier.round} (over {outlier.limit:g} times is an outlier)."
    return element("p", text, class_="warning")
