"""The tables of a comparison, for the terminal, for table.md and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import get_args

from fedflame.compare.bounds import Bound
from fedflame.compare.comparison import Comparison, Reading
from fedflame.compare.grid import Setting
from fedflame.compare.intervals import CONFIDENCE, Difference, Summary, paired_difference, summarize
from fedflame.compare.results import CellResult, OwnScores
from fedflame.report.numbers import MISSING, decimal, duration, percent, si
from fedflame.report.results import SCORE_LABELS, tier_label

DIGITS = 3
START = "before training"


@dataclass(frozen=True)
class Entry:
    """One cell of a table. Its mood is a class of style.css: `better`, `worse`, `after` or none."""

    text: str
    mood: str = ""
    detail: str = ""
    """Shown after the text, or below it on the page."""


@dataclass(frozen=True)
class ResultTable:
    """A table with a title, headers, and rows that start with their name."""

    title: str
    headers: list[str]
    rows: list[list[Entry]]


@dataclass(frozen=True)
class Measure:
    """A measure, and how it is shown."""

    name: str
    label: str
    rising: bool
    """Whether a larger value is better."""

    def show(self, value: float) -> str:
        if self.name == "exact_match" and math.isfinite(value):
            return f"{100 * value:.1f}"
        return decimal(value, DIGITS)

    def show_difference(self, value: float) -> str:
        return f"{100 * value:+.1f}" if self.name == "exact_match" else f"{value:+.{DIGITS}f}"


def measures(comparison: Comparison, setting: Setting) -> list[Measure]:
    """Return the measures of a setting: loss, and the score by generation if there is one."""
    found = [Measure("loss", "Response loss", rising=False)]
    if score := comparison.score(setting):
        unit = " (%)" if score == "exact_match" else ""
        found.append(Measure(score, SCORE_LABELS[score] + unit, rising=True))
    return found


def setting_name(setting: Setting) -> str:
    """Format as `data.alpha = 0.5, data.partition = dirichlet`; empty if the seed is the only axis."""
    return ", ".join(f"{key} = {value}" for key, value in setting)


def setting_tables(comparison: Comparison, setting: Setting) -> Iterator[ResultTable]:
    """Yield the tables of one setting, except `device_table`, which is long."""
    for measure in measures(comparison, setting):
        yield summary_table(comparison, setting, measure)
        if len(comparison.methods(setting)) > 1:
            yield difference_table(comparison, setting, measure)
        yield from deployment_tables(comparison, setting, measure)
        yield from bound_tables(comparison, setting, measure)
    yield total_table(comparison, setting)


def summary_table(comparison: Comparison, setting: Setting, measure: Measure) -> ResultTable:
    """Show mean and deviation of the final model at each k, by method; mark the best mean of a column."""
    tiers, methods = comparison.tiers(setting), comparison.methods(setting)
    origin = comparison.grid.baseline if comparison.grid.baseline in methods else methods[0]
    finals = {
        method: [comparison.final(setting, method, measure.name, k) for k in tiers] for method in methods
    }
    best = [_best([finals[method][i] for method in methods], measure.rising) for i in range(len(tiers))]
    rows = [
        [Entry(START), *[_entry(comparison.start(setting, origin, measure.name, k), measure) for k in tiers]]
    ]
    for method in methods:
        seeds = len(comparison.seeds(setting, method))
        cells = [
            _entry(summary, measure, "after" if summary and summary.mean == best[i] else "", seeds)
            for i, summary in enumerate(finals[method])
        ]
        rows.append([Entry(method), *cells])
    counts = sorted({len(comparison.seeds(setting, method)) for method in methods})
    over = "one seed" if counts == [1] else f"mean ± standard deviation over {_range(counts)} seeds"
    return ResultTable(f"{measure.label}, {over}", ["method", *map(tier_label, tiers)], rows)


def _best(summaries: Sequence[Summary | None], rising: bool) -> float | None:
    means = [summary.mean for summary in summaries if summary]
    finite = [mean for mean in means if math.isfinite(mean)]
    return (max if rising else min)(finite) if finite and len(means) > 1 else None


def _entry(summary: Summary | None, measure: Measure, mood: str = "", seeds: int = 0) -> Entry:
    """Format a summary. If not all of the `seeds` finished seeds have a value, say how many have."""
    if summary is None:
        return Entry(MISSING)
    if summary.not_finite:
        return Entry(measure.show(summary.mean), "worse", f"{summary.not_finite} of {summary.count} seeds")
    spread = "" if summary.deviation is None else f" ± {measure.show(summary.deviation)}"
    partial = f"{summary.count} of {seeds} seeds" if summary.count < seeds else ""
    return Entry(measure.show(summary.mean) + spread, mood, partial)


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def difference_table(comparison: Comparison, setting: Setting, measure: Measure) -> ResultTable:
    """Show the paired difference to the baseline at each k: mean, verdict and interval."""
    tiers = comparison.tiers(setting)
    rows = _differences(comparison, setting, measure, tiers, CellResult.last)
    return ResultTable(_difference_title(comparison, measure), ["method", *map(tier_label, tiers)], rows)


def _difference_title(comparison: Comparison, measure: Measure) -> str:
    baseline = comparison.grid.baseline
    return f"{measure.label}: difference to {baseline} at the same seed [{CONFIDENCE:.0%} interval]"


def _differences(
    comparison: Comparison, setting: Setting, measure: Measure, columns: Sequence[int], reading: Reading
) -> list[list[Entry]]:
    pairs = max(len(comparison.seeds(setting, method)) for method in comparison.methods(setting))
    rows = []
    for method in comparison.methods(setting):
        if method != comparison.grid.baseline:
            found = [comparison.difference(setting, method, measure.name, at, reading) for at in columns]
            rows.append([Entry(method), *[_difference(difference, measure, pairs) for difference in found]])
    return rows


def deployment_tables(comparison: Comparison, setting: Setting, measure: Measure) -> Iterator[ResultTable]:
    """Yield two tables of what devices deploy: results with k, rank and forward cost; paired differences."""
    budgets, methods = comparison.budgets(setting), comparison.methods(setting)
    if not budgets:
        return
    headers = ["method", *(f"affords {tier_label(budget)}" for budget in budgets)]
    rows = [[Entry(m), *[_deployed(comparison, setting, m, measure, b) for b in budgets]] for m in methods]
    title = f"{measure.label} of what each device deploys, and its forward cost (100 % is all K experts)"
    yield ResultTable(title, headers, rows)
    if len(methods) > 1:
        rows = _differences(comparison, setting, measure, budgets, CellResult.last_deployed)
        yield ResultTable(f"As deployed. {_difference_title(comparison, measure)}", headers, rows)


def _deployed(comparison: Comparison, setting: Setting, method: str, measure: Measure, budget: int) -> Entry:
    summary = comparison.final(setting, method, measure.name, budget, CellResult.last_deployed)
    deployed = comparison.deployed(setting, method, budget)
    if summary is None or deployed is None:
        return Entry(MISSING)
    entry = _entry(summary, measure, seeds=len(comparison.seeds(setting, method)))
    place = f"{tier_label(deployed.active_experts)}, r = {deployed.rank}: {percent(deployed.relative_flops)}"
    return replace(entry, detail=", ".join(filter(None, (place, entry.detail))))


def bound_tables(comparison: Comparison, setting: Setting, measure: Measure) -> Iterator[ResultTable]:
    """Yield a table for each method: what each client has alone, in the federation, and with all rows."""
    bounds = {bound: comparison.own_scores(setting, bound) for bound in get_args(Bound)}
    if any(bounds.values()):
        for method in comparison.methods(setting):
            federated = comparison.own_scores(setting, method)
            yield _bound_table(method, measure, bounds["standalone"], federated, bounds["centralised"])


_OfClients = Mapping[int, Mapping[int, OwnScores]]


def _bound_table(
    method: str, measure: Measure, alone: _OfClients, federated: _OfClients, central: _OfClients
) -> ResultTable:
    headers = ["client", "rows", "k", "alone", method, "centralised", f"{method} minus alone"]
    columns = alone, federated, central
    rows = []
    for client in sorted({client for column in columns for client in column}):
        of_client = [column.get(client, {}) for column in columns]
        scored = {**of_client[1], **of_client[0]}
        one = next(iter(scored.values()), None)
        if one is not None:
            held = [own.rows for own in scored.values()]
            about = [Entry(one.name), Entry(f"{round(fmean(held)):,}"), Entry(str(one.active_experts))]
            rows.append([*about, *_bounded(measure, [_by_seed(measure, of_seeds) for of_seeds in of_client])])
    together = [_mean_over_clients(measure, column, alone or federated) for column in columns]
    rows.append([Entry("mean over clients"), Entry(""), Entry(""), *_bounded(measure, together)])
    title = f"{measure.label} on each client's own held-out rows [{CONFIDENCE:.0%} interval over seeds]"
    return ResultTable(title, headers, rows)


def _bounded(measure: Measure, values: Sequence[Mapping[int, float]]) -> list[Entry]:
    """Format the values by seed of alone, federated and centralised, and the paired difference of two."""
    seeds = max(map(len, values))
    summaries = [summarize(list(of_seeds.values())) if of_seeds else None for of_seeds in values]
    alone, federated, _ = values
    pairs = [value - alone[seed] for seed, value in federated.items() if seed in alone]
    difference = _difference(paired_difference(pairs) if pairs else None, measure, seeds)
    return [*(_entry(summary, measure, seeds=seeds) for summary in summaries), difference]


def _by_seed(measure: Measure, of_seeds: Mapping[int, OwnScores]) -> dict[int, float]:
    taken = {seed: own.value(measure.name) for seed, own in of_seeds.items()}
    return {seed: value for seed, value in taken.items() if value is not None}


def _mean_over_clients(measure: Measure, column: _OfClients, wanted: _OfClients) -> dict[int, float]:
    """Return the mean over clients by seed, for the seeds in which every client has a value."""
    values = {client: _by_seed(measure, of_seeds) for client, of_seeds in column.items()}
    seeds = {
        seed
        for seed in set().union(*values.values())
        if all(seed in values.get(client, {}) for client, of in wanted.items() if seed in of)
    }
    return {
        seed: fmean(values[client][seed] for client, of in wanted.items() if seed in of)
        for seed in sorted(seeds)
    }


def _difference(difference: Difference | None, measure: Measure, pairs: int) -> Entry:
    """Format a difference. If it has fewer than `pairs` pairs, say how many."""
    if difference is None:
        return Entry(MISSING)
    if not math.isfinite(difference.mean):
        return Entry(difference.verdict(measure.rising), "worse")
    mean, verdict = measure.show_difference(difference.mean), difference.verdict(measure.rising)
    if difference.interval is None:
        return Entry(f"{mean} {verdict}")
    low, high = map(measure.show_difference, difference.interval)
    mood = verdict if verdict in ("better", "worse") else ""
    partial = f", {difference.count} of {pairs} pairs" if difference.count < pairs else ""
    return Entry(f"{mean} {verdict}", mood, f"[{low}, {high}]{partial}")


def total_table(comparison: Comparison, setting: Setting) -> ResultTable:
    """Show the cost of a whole run of each method, for all clients together."""
    headers = ["method", "tokens", "training FLOPs", "sent up", "sent down", "simulated time", "of baseline"]
    methods = comparison.methods(setting)
    times = {method: comparison.total(setting, method).simulated_seconds for method in methods}
    whole = times.get(comparison.grid.baseline)
    epsilons = {method: comparison.epsilon(setting, method) for method in methods}
    private = any(epsilon is not None for epsilon in epsilons.values())
    headers += ["epsilon"] * private
    rows = []
    for method in methods:
        devices = comparison.device_costs(setting, method)
        rows.append(
            [
                Entry(method),
                Entry(si(sum(device.tokens for device in devices))),
                Entry(si(sum(device.training_flops for device in devices), "FLOP")),
                Entry(si(sum(device.bytes_up for device in devices), "B")),
                Entry(si(sum(device.bytes_down for device in devices), "B")),
                Entry(duration(times[method])),
                Entry(percent(times[method] / whole) if whole else MISSING),
                *[Entry(decimal(epsilons[method], 2))] * private,
            ]
        )
    return ResultTable("Cost of a run, all clients together", headers, rows)


def device_table(comparison: Comparison, setting: Setting) -> ResultTable:
    """Show the cost of a whole run for the clients of each budget."""
    headers = ["method", "device affords", "clients", "trains", "tokens", "training FLOPs"]
    headers += ["sent up", "sent down", "busy, per client"]
    rows = []
    for method in comparison.methods(setting):
        total = comparison.total(setting, method).simulated_seconds
        for device in comparison.device_costs(setting, method):
            share = f" ({device.busy_seconds / total:.0%} of the run)" if total else ""
            rows.append(
                [
                    Entry(method),
                    Entry(tier_label(device.budget)),
                    Entry(f"{round(device.clients, 1):g}"),
                    Entry(f"k = {device.active_experts}"),
                    Entry(si(device.tokens)),
                    Entry(si(device.training_flops, "FLOP")),
                    Entry(si(device.bytes_up, "B")),
                    Entry(si(device.bytes_down, "B")),
                    Entry(duration(device.busy_seconds) + share),
                ]
            )
    return ResultTable("Cost by device", headers, rows)


def markdown(tables: Iterable[ResultTable]) -> str:
    """Format tables as Markdown, one below the other."""
    return "\n\n".join(_markdown(table) for table in tables) + "\n"


def _markdown(table: ResultTable) -> str:
    lines = [table.headers, ["---"] * len(table.headers)]
    lines += [[_marked(entry) for entry in row] for row in table.rows]
    rows = (" | ".join(text.replace("|", "\\|") for text in line) for line in lines)
    return "\n".join([f"**{table.title}**", "", *(f"| {row} |" for row in rows)])


def _marked(entry: Entry) -> str:
    text = f"**{entry.text}**" if entry.mood == "after" else entry.text
    return f"{text} {entry.detail}".rstrip()
