"""Build the whole page: header, sections in order, configuration and environment."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from typing import Any

from fedflame.config.methods import METHODS, OF_ALL_METHODS
from fedflame.config.settings import flat
from fedflame.config.strategy_section import StrategyConfig
from fedflame.report import at_clients, clients, privacy, results, tasks, updates
from fedflame.report.markup import Markup, element, join, note, section, table
from fedflame.report.numbers import plural, si
from fedflame.report.records import Run

_SECTIONS = (
    results.headline,
    results.deployments,
    tasks.tasks,
    results.charts,
    at_clients.at_clients,
    privacy.privacy,
    results.categories,
    clients.activation,
    clients.rescaler,
    clients.partition,
    clients.cost,
    updates.updates,
    clients.rounds,
)


def page(run: Run) -> str:
    """Return the report as one HTML document that loads no other file."""
    return document(run.folder.resolve().name, [run_header(run, "fedflame run report"), *run_sections(run)])


def run_sections(run: Run) -> list[Markup]:
    """Return all parts of the page of a run but its head."""
    return [*[make(run) for make in _SECTIONS], _settings(run)]


def document(name: str, body: Sequence[Markup]) -> str:
    """Return an HTML document in the style of the reports; it loads no other file."""
    style = resources.files("fedflame.report").joinpath("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", f"{name} · fedflame"),
        element("style", Markup(style)),
    )
    whole = element("html", head, "\n", element("body", element("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def header(kicker: str, name: str, facts: Sequence[tuple[str, object]]) -> Markup:
    """Return the head of a page: its kind (`kicker`), its name, and named facts."""
    items = [element("div", element("dt", key), element("dd", value)) for key, value in facts]
    return element(
        "header",
        element("p", kicker, class_="kicker"),
        element("h1", name),
        element("dl", *items),
    )


def run_header(run: Run, kicker: str) -> Markup:
    """Return the head of the page of a run; see `header`."""
    facts = [("Strategy", _strategy(run)), ("Model", run.setting("model", "model_name_or_path"))]
    facts += [("Data", _data(run)), ("Rounds", _rounds(run)), ("Clients", _clients(run))]
    facts += [("Adapter", _adapter(run)), ("Date", _date(run)), ("fedflame", _version(run))]
    return header(kicker, run.folder.resolve().name, facts)


def _strategy(run: Run) -> str:
    """Return the method with those of its options that differ from their defaults."""
    strategy: dict[str, Any] = run.config["strategy"]
    name = str(strategy.get("name"))
    options = METHODS[name].options | OF_ALL_METHODS if name in METHODS else frozenset()
    chosen = {key: value for key, value in strategy.items() if key in options - {"name"}}
    details = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in chosen.items()
        if value != StrategyConfig.model_fields[key].default
    ]
    return ", ".join([name, *details])


def _data(run: Run) -> str:
    """The data and how they were split, as it was done; as it was asked for where that is not known."""
    data: dict[str, Any] = run.config.get("data", {})
    split = run.partition if "partition" in run.partition else data
    text = f"{data.get('dataset_name')}, {split.get('partition')}"
    return f"{text} (alpha {split.get('alpha')})" if split.get("partition") == "dirichlet" else text


def _rounds(run: Run) -> str:
    done = len({event.round for event in run.rounds})
    stopped = ", stopped early" if run.stop else ""
    return f"{done} of {run.setting('server', 'num_server_rounds')} finished{stopped}"


def _clients(run: Run) -> str:
    known = run.clients()
    if not known:
        return str(run.setting("clients", "num_clients"))
    share = run.setting("server", "fraction_train")
    sampled = f", {share:.0%} sampled per round" if isinstance(share, float) and share < 1 else ""
    return f"{len(known)} in {plural(len(set(known.values())), 'tier')}{sampled}"


def _adapter(run: Run) -> str:
    text = f"LoRA r {run.setting('adapter', 'r')}"
    if "adapter_parameters" in run.plan:
        text += f", {si(run.plan['adapter_parameters'])} parameters"
    return f"{text}, {si(run.plan['adapter_bytes'], 'B')}" if "adapter_bytes" in run.plan else text


def _date(run: Run) -> str:
    """Return the recorded start of the run, or else when its configuration was written."""
    if "date" in run.environment:
        return str(run.environment["date"])
    written = (run.folder / "config.json").stat().st_mtime
    return datetime.fromtimestamp(written).astimezone().strftime("%Y-%m-%d %H:%M")


def _version(run: Run) -> str:
    return str(run.environment.get("fedflame", "unknown version"))


def _settings(run: Run) -> Markup:
    """Show configuration and environment, folded."""
    environment: object = note("Not recorded.")
    if run.environment:
        environment = table(["Name", "Value"], run.environment.items(), "settings")
    folds = [
        fold("Configuration", table(["Key", "Value"], flat(run.config).items(), "settings")),
        fold("Environment", environment),
    ]
    return section("Settings", join(folds))


def fold(title: str, content: object) -> Markup:
    """Return a part of the page that opens on a click."""
    return element("details", element("summary", title), content)
