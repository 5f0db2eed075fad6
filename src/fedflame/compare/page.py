"""The page of a comparison: tables, and curves against the cost of each method."""

from __future__ import annotations

from collections.abc import Iterable

from fedflame.compare.comparison import Comparison, Point, values_by_key
from fedflame.compare.grid import Setting
from fedflame.compare.tables import (
    Entry,
    Measure,
    ResultTable,
    bound_tables,
    deployment_tables,
    device_table,
    difference_table,
    measures,
    setting_name,
    summary_table,
    total_table,
)
from fedflame.config.run_config import BESIDE_RESULTS
from fedflame.config.settings import flat
from fedflame.report.charts import LINE_COLOURS, ROUNDS, Series, XAxis, legend, line_chart
from fedflame.report.markup import Markup, element, join, note, section, table
from fedflame.report.numbers import plural, si
from fedflame.report.page import document, fold, header
from fedflame.report.results import tier_label

_AXES = (
    ("round", ROUNDS),
    ("training_flops", XAxis("training FLOPs of all clients", si, whole=False)),
    ("bytes", XAxis("bytes sent, up and down", lambda value: si(value, "B"), whole=False)),
    ("simulated_seconds", XAxis("simulated seconds on unequal devices", si, whole=False)),
)
"""Pairs of a field of `Spent` and the axis that shows it."""


def page(comparison: Comparison, name: str) -> str:
    """Return the comparison as one HTML document that loads no other file."""
    body = [_header(comparison, name), *_failures(comparison)]
    for setting in comparison.settings():
        parts = (_results, _differences, _bounds, _deployments, _curves, _costs)
        body += [make(comparison, setting) for make in parts]
    return document(name, [*body, _settings(comparison)])


def _header(comparison: Comparison, name: str) -> Markup:
    grid = comparison.grid
    configs = [cell.config for cell in grid.cells]
    seeds = dict.fromkeys(str(config.seed) for config in configs)
    models = dict.fromkeys(config.model.model_name_or_path for config in configs)
    data = dict.fromkeys(config.data.dataset_name for config in configs)
    facts: list[tuple[str, object]] = [
        ("Methods", ", ".join(grid.methods)),
        ("Baseline", grid.baseline),
        ("Seeds", ", ".join(seeds)),
        ("Cells finished", f"{len(comparison.results)} of {len(grid.cells)}"),
        ("Model", ", ".join(models)),
        ("Data", ", ".join(data)),
        ("Strongest device", f"{si(grid.devices.flops_per_second, 'FLOP')}/s (assumed)"),
        ("Connection", f"{si(grid.devices.bytes_per_second, 'B')}/s (assumed)"),
    ]
    return header("fedflame comparison", name, facts)


def _failures(comparison: Comparison) -> list[Markup]:
    if not comparison.failures:
        return []
    rows = [[cell, element("td", failure, class_="worse")] for cell, failure in comparison.failures.items()]
    return [section("Failed cells", table(["Cell", "Reason"], rows, "settings"))]


def _titled(title: str, setting: Setting, *children: object) -> Markup:
    where = setting_name(setting)
    return section(f"{title} · {where}" if where else title, *children)


def _results(comparison: Comparison, setting: Setting) -> Markup:
    tables = [summary_table(comparison, setting, measure) for measure in measures(comparison, setting)]
    text = "On held-out rows, after the last round. k is the number of experts that run per token. The "
    text += "global model of each method is measured at each k. The best mean of a column is bold."
    return _titled("Results", setting, *map(_table, tables), note(text))


def _differences(comparison: Comparison, setting: Setting) -> Markup:
    if len(comparison.methods(setting)) < 2:
        return _titled("Paired differences", setting, note("There is one method."))
    tables = [difference_table(comparison, setting, measure) for measure in measures(comparison, setting)]
    text = "Method minus baseline at the same seed, hence with the same data, partition and batches. The "
    text += "interval is Student's, over seeds. A method is called better or worse if its interval excludes "
    text += "zero. Intervals are not corrected for the number of comparisons."
    return _titled("Paired differences", setting, *map(_table, tables), note(text))


def _bounds(comparison: Comparison, setting: Setting) -> Markup:
    tables = [
        table
        for measure in measures(comparison, setting)
        for table in bound_tables(comparison, setting, measure)
    ]
    if not tables:
        return join([])
    text = "Each client is scored on rows of its own that nobody trains on. Alone: trained on its other rows "
    text += "only, with as many steps. Centralised: one machine has the rows of all, runs all K experts, and "
    text += "takes as many steps as all clients together. Differences are paired by seed."
    return _titled("Does federating help each client?", setting, *map(_table, tables), note(text))


def _deployments(comparison: Comparison, setting: Setting) -> Markup:
    tables = [
        table
        for measure in measures(comparison, setting)
        for table in deployment_tables(comparison, setting, measure)
    ]
    text = "If all clients of a method train with K experts, every device runs K experts, whatever that "
    text += "costs. If the method cuts the adapter, a device has only its first ranks. In other methods each "
    text += "device runs the k that it affords."
    return _titled("What each device deploys", setting, *map(_table, tables), note(text))


def _costs(comparison: Comparison, setting: Setting) -> Markup:
    tables = [total_table(comparison, setting), device_table(comparison, setting)]
    text = "Means over seeds, accepted updates only. Simulated time: a device that affords k experts trains "
    text += "them in the time in which the strongest device trains K. A round waits for the computing and "
    text += "the transfer of its slowest client."
    return _titled("Cost", setting, *map(_table, tables), note(text))


def _table(result: ResultTable) -> Markup:
    rows = [[entry.text if i == 0 else _cell(entry) for i, entry in enumerate(row)] for row in result.rows]
    return element(
        "figure",
        element("figcaption", result.title),
        table(result.headers, rows),
        class_="compared",
    )


def _cell(entry: Entry) -> Markup:
    below = [element("small", entry.detail)] if entry.detail else []
    return element("td", entry.text, *below, class_=entry.mood or None)


def _curves(comparison: Comparison, setting: Setting) -> Markup:
    methods = comparison.methods(setting)
    colours = {method: i % LINE_COLOURS for i, method in enumerate(comparison.grid.methods)}
    loss, *scores = measures(comparison, setting)
    parts = [_measure_curves(comparison, setting, loss, colours)]
    parts += [fold(score.label, _measure_curves(comparison, setting, score, colours)) for score in scores]
    text = "Lines are means over seeds, bands one standard deviation to each side."
    key = legend([(f"t{colours[method]}", method) for method in methods])
    return _titled("Curves", setting, note(text), key, *parts)


def _measure_curves(
    comparison: Comparison, setting: Setting, measure: Measure, colours: dict[str, int]
) -> Markup:
    parts = []
    for spent, axis in _AXES:
        charts = [
            _chart(comparison, setting, measure, tier, spent, axis, colours)
            for tier in comparison.tiers(setting)
        ]
        parts.append(element("h3", f"{measure.label} against {axis.label}"))
        parts.append(element("div", *charts, class_="multiples"))
    return join(parts)


def _chart(
    comparison: Comparison,
    setting: Setting,
    measure: Measure,
    tier: int,
    spent: str,
    axis: XAxis,
    colours: dict[str, int],
) -> Markup:
    series = [
        _series(
            method, colours[method], comparison.curve(setting, method, measure.name, tier), spent, measure
        )
        for method in comparison.methods(setting)
    ]
    measured = any(line.points for line in series)
    drawn = (
        line_chart(series, measure.label, measure.rising, axis, end_labels=False)
        if measured
        else note("None.")
    )
    return element("figure", element("figcaption", tier_label(tier)), drawn)


def _series(method: str, colour: int, points: Iterable[Point], spent: str, measure: Measure) -> Series:
    scale = 100 if measure.name == "exact_match" else 1
    line, band = [], []
    for point in points:
        mean, deviation = scale * point.summary.mean, scale * (point.summary.deviation or 0.0)
        line.append((getattr(point.spent, spent), mean))
        band.append((mean - deviation, mean + deviation))
    return Series(method, colour, line, band)


def _settings(comparison: Comparison) -> Markup:
    """Show configuration and environment of all cells, folded."""
    cells = comparison.grid.cells
    configs = [flat(cell.config.model_dump(exclude=BESIDE_RESULTS)) for cell in cells]
    environment = comparison.environment().items()
    parts = [
        fold("Configuration", table(["Key", "Values"], values_by_key(configs).items(), "settings")),
        fold("Environment", table(["Name", "Values"], environment, "settings")),
    ]
    return section(
        "Settings", note(plural(len(configs), "cell"), ". A key with several values lists them."), *parts
    )
