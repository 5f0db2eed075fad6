"""The sections on clients: expert activation, rescaler, data, cost and rounds."""

from __future__ import annotations

from collections import defaultdict

from fedflame.report.charts import CATEGORY_COLOURS, heat_legend, heat_map, legend, sparkline, stacked_bar
from fedflame.report.markup import Markup, element, join, note, section, table
from fedflame.report.numbers import MISSING, decimal, duration, plural, si
from fedflame.report.records import Run
from fedflame.report.results import tier_colours, tier_label, training_loss

# A page with more cells than this is slow to open.
_MAX_HEAT_CELLS = 20_000


def activation(run: Run) -> Markup:
    """Show for each client how often each expert of each layer was activated in training."""
    maps, cells, left_out = [], 0, 0
    for client, k in run.clients().items():
        frequencies, tokens = _frequencies(run, client)
        if cells + sum(map(len, frequencies)) > _MAX_HEAT_CELLS:
            left_out += 1
            continue
        cells += sum(map(len, frequencies))
        has_trained = any(update.client == client for update in run.updates)
        maps.append(_client_map(client, run.name(client), k, frequencies, tokens, has_trained))
    if not maps:
        return section("Expert activation", note("No client is recorded yet."))
    text = "Share of the client's training tokens routed to each expert, over all rounds: "
    text += "layers downwards, experts across."
    if left_out:
        text += f" {plural(left_out, 'further client')} not drawn, to keep the page light."
    columns = element("div", *maps, class_="columns")
    return section("Expert activation", note(text), heat_legend(), columns)


def _client_map(
    client: int, name: str, k: int, frequencies: list[list[float]], tokens: int, has_trained: bool
) -> Markup:
    title = f"{name} · {tier_label(k)}"
    if not frequencies:
        return element(
            "figure",
            element("figcaption", title),
            note("Tells no counts." if has_trained else "Has not trained."),
        )
    never = sum(frequency == 0 for row in frequencies for frequency in row)
    total = sum(map(len, frequencies))
    facts = f" · {si(tokens)} tokens · {never} of {total} never activated"
    caption = element("figcaption", title, element("small", facts))
    return element("figure", caption, heat_map(frequencies), data_client=client)


def _frequencies(run: Run, client: int) -> tuple[list[list[float]], int]:
    """Return counts / tokens [L][E] and the tokens; empty and 0 if the client has not trained."""
    updates = [update for update in run.updates if update.client == client and update.counts]
    tokens = sum(update.tokens for update in updates)
    if not tokens:
        return [], 0
    layers = zip(*[update.counts for update in updates], strict=True)
    sums = [[sum(counts) for counts in zip(*layer, strict=True)] for layer in layers]
    return [[count / tokens for count in layer] for layer in sums], tokens


def rescaler(run: Run) -> Markup:
    """Show the rescaler of every tier and layer over the rounds."""
    values = _tier_rescalers(run)
    everything = [s for rounds in values.values() for layers in rounds for s in layers]
    if not everything:
        return section("Rescaler", note("No rescaler is recorded."))
    if all(s == 1 for s in everything):
        return section("Rescaler", note("It is 1 on every tier and layer throughout."))
    low, high = min(everything), max(everything)
    colours = tier_colours(run)
    rows = [
        [f"Layer {layer}"]
        + [
            _rescaler_cell(
                [s[layer] for s in rounds], low, high, colours[tier], f"{tier_label(tier)}, layer {layer}"
            )
            for tier, rounds in values.items()
        ]
        for layer in range(len(next(iter(values.values()))[0]))
    ]
    text = "Factor on the routed output of each layer, round by round: the mean over the tier's clients, "
    text += f"weighted by rows. The lines share one scale, from {low:.3f} to {high:.3f}; the number is the "
    text += "last round's."
    return section("Rescaler", table(["", *map(tier_label, values)], rows, "rescaler"), note(text))


def _rescaler_cell(values: list[float], low: float, high: float, colour: int, where: str) -> Markup:
    title = f"{where}: " + ", ".join(f"{value:.3f}" for value in values)
    return join([sparkline(values, low, high, colour, title), element("span", decimal(values[-1], 3))])


def _tier_rescalers(run: Run) -> dict[int, list[list[float]]]:
    """Return tier -> round -> layer: the mean over the tier's clients, weighted by the counted rows."""
    groups: dict[int, dict[int, list[tuple[float, list[float]]]]] = defaultdict(lambda: defaultdict(list))
    trained = run.setting("strategy", "counted_rows") == "trained"
    for update in run.updates:
        if update.rescaler:
            rows = update.trained_examples if trained else update.num_examples
            groups[update.active_experts][update.round].append((rows, update.rescaler))
    return {
        tier: [_weighted_mean(groups[tier][at]) for at in sorted(groups[tier])]
        for tier in sorted(groups, reverse=True)
    }


def _weighted_mean(vectors: list[tuple[float, list[float]]]) -> list[float]:
    total = sum(weight for weight, _ in vectors)
    layers = zip(*[vector for _, vector in vectors], strict=True)
    weights = [weight / total for weight, _ in vectors]
    return [sum(w * s for w, s in zip(weights, layer, strict=True)) for layer in layers]


def partition(run: Run) -> Markup:
    """Show how many rows of each category each client holds."""
    clients = run.partition.get("clients", [])
    if not clients:
        return section("Data of the clients", note("No partition is recorded."))
    names = _legend_names(run)
    full = max(1, *(client["rows"] for client in clients))
    k = run.clients()
    rows = []
    for client in clients:
        held: dict[str, int] = dict.fromkeys(names, 0)
        for name, count in client["per_category"].items():
            held[name if name in held else "other"] += count
        parts = [(name, i, count) for i, (name, count) in enumerate(held.items())]
        label = join([f"{run.name(client['client'])} ", element("small", tier_label(k[client["client"]]))])
        bar = element("td", stacked_bar(parts, full), class_="wide")
        rows.append([label, bar, f"{client['rows']} rows"])
    entries = [(f"p{i}", name) for i, name in enumerate(names)]
    return section("Data of the clients", legend(entries), table(["", "", ""], rows, "bars"), _row_facts(run))


def _legend_names(run: Run) -> list[str]:
    """Return the categories with a colour of their own; if there are too many, the largest and "other"."""
    totals: dict[str, int] = dict.fromkeys(run.partition.get("categories", []), 0)
    for client in run.partition["clients"]:
        for name, count in client["per_category"].items():
            totals[name] = totals.get(name, 0) + count
    names = list(totals)
    if len(names) > CATEGORY_COLOURS:
        names = [*sorted(names, key=lambda name: -totals[name])[:CATEGORY_COLOURS], "other"]
    return names


def _row_facts(run: Run) -> Markup:
    known = {
        "rows": "rows",
        "held_out_rows": "held out",
        "truncated_rows": "truncated",
        "skipped_rows": "skipped",
    }
    facts = [f"{run.partition[key]} {name}" for key, name in known.items() if key in run.partition]
    return note(", ".join(facts))


def cost(run: Run) -> Markup:
    """Show what each client computed and sent in all rounds."""
    headers = [
        "Client",
        "k",
        "Rounds",
        "Steps",
        "Tokens",
        "Time",
        "Tokens / s",
        "Training cost",
        "Sent up",
        "Sent down",
    ]
    rows = [_cost_row(run, client, k) for client, k in run.clients().items()]
    if not rows:
        return section("Cost by client", note("No client is recorded yet."))
    return section("Cost by client", table(headers, rows), note("Accepted updates only."))


def _cost_row(run: Run, client: int, k: int) -> list[object]:
    updates = [update for update in run.updates if update.client == client]
    if not updates:
        return [run.name(client), k, 0, *[MISSING] * 7]
    tokens = sum(update.tokens for update in updates)
    seconds = sum(update.seconds for update in updates)
    return [
        run.name(client),
        k,
        len(updates),
        f"{sum(update.steps for update in updates):,}",
        si(tokens),
        duration(seconds),
        si(tokens / seconds) if seconds else MISSING,
        si(sum(update.training_flops for update in updates), "FLOP"),
        si(sum(update.bytes_up for update in updates), "B"),
        si(sum(update.bytes_down for update in updates), "B"),
    ]


def rounds(run: Run) -> Markup:
    """Show every round, with the clients that were excluded and the reasons."""
    numbers = sorted({event.round for event in run.events if event.round > 0})
    if not numbers:
        return section("Rounds", note("No round has begun."))
    headers = ["Round", "Clients", "Time", "Training loss", "Excluded"]
    return section("Rounds", table(headers, [_round_row(run, number) for number in numbers], "rounds"))


def _round_row(run: Run, number: int) -> list[object]:
    end = next((event for event in run.rounds if event.round == number), None)
    updates = [update for update in run.updates if update.round == number]
    loss = training_loss(updates)
    excluded = [
        element("div", f"{run.name(event.client)} ({tier_label(event.active_experts)}): {event.reason}")
        for event in run.exclusions
        if event.round == number
    ]
    return [
        number,
        end.clients if end else len(updates),
        duration(end.seconds) if end else "not finished",
        decimal(loss, 3),
        join(excluded) if excluded else MISSING,
    ]
