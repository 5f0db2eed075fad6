"""The page of a run in progress: what happens now, then the sections of the report so far."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedflame.config.run_config import sampled_clients
from fedflame.errors import UserError
from fedflame.folder_lock import holder
from fedflame.page_server import as_it_is, remade
from fedflame.report.charts import stacked_bar
from fedflame.report.markup import Markup, element, note, section
from fedflame.report.numbers import duration, plural
from fedflame.report.page import document, header, run_header, run_sections
from fedflame.report.records import Run, read_run
from fedflame.run_files import LOCK
from fedflame.run_files.checkpoints import kept_rounds
from fedflame.run_files.lines import FILE_NAME

_CONFIG, _KICKER = "config.json", "fedflame run, live"
_ANSWERED, _SCORED, _LEFT_OUT = 2, 1, 6
"""Numbers of colour classes in style.css."""


def live_page(folder: Path) -> Callable[[], str]:
    """Return what makes the page of a run folder, anew only where something of the folder has changed.

    Raises:
        UserError: it is no folder of a run, begun or about to begin.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder}: {what}; watch needs a run folder, or the file or folder of a site")
    if not any((folder / name).exists() for name in (LOCK, _CONFIG)):
        raise UserError(
            f"{folder}: neither a run folder, which holds a config.json, nor one with a site.toml"
        )
    page = remade(partial(_page, folder), partial(_state, folder))

    def live() -> str:
        try:
            return page()
        except (UserError, OSError) as error:  # a run that begins, or goes on, writes its files just now
            return _waiting(folder, f"The run cannot be read whole just now: {error}")

    return live


def _state(folder: Path) -> tuple[object, ...]:
    """Return what changes whenever the page does."""
    files = [as_it_is(folder / name) for name in (_CONFIG, FILE_NAME)]
    return (*files, *kept_rounds(folder), holder(folder / LOCK))


def _page(folder: Path) -> str:
    if not (folder / _CONFIG).exists():
        return _waiting(folder, "The run loads its model and its data, and then begins to write.")
    run = read_run(folder)
    return document(folder.resolve().name, [run_header(run, _KICKER), _now(run), *run_sections(run)])


def _waiting(folder: Path, why: str) -> str:
    name = folder.resolve().name
    now = section("Now", element("p", "Waiting for round 1."), note(why))
    return document(name, [header(_KICKER, name, []), now])


def _now(run: Run) -> Markup:
    """Show who writes the run folder, and how far the round under way is."""
    kept, total = kept_rounds(run.folder), int(run.setting("server", "num_server_rounds"))
    by = holder(run.folder / LOCK)
    last = kept[-1] if kept else -1
    stop = run.stop if run.stop and run.stop.round == last else None
    ended = last == total or stop
    state = f"Running: {by}." if by else "Finished." if ended else "No process writes this run now."
    parts = [element("p", state)]
    if stop:
        return section("Now", *parts, note(f"It stopped after round {last} of {total}: {stop.reason}."))
    if ended:
        return section("Now", *parts, note(f"All {plural(total, 'round')} are done."))
    parts += _before(run) if last < 0 else _round(run, last + 1, total)
    if not by:
        parts.append(note(f"fedflame run --resume goes on after round {max(0, last)}."))
    return section("Now", *parts)


def _before(run: Run) -> list[Markup]:
    scored = {evaluation.active_experts for evaluation in run.evaluations}
    text = "Waiting for round 1. The model before training is scored on held-out rows: "
    return [element("p", text, f"{plural(len(scored), 'tier')} done.")]


def _round(run: Run, number: int, total: int) -> list[Markup]:
    """Show one round that is under way."""
    share, clients = run.setting("server", "fraction_train"), run.setting("clients", "num_clients")
    sampled = sampled_clients(float(share), int(clients))
    answered = [update.client for update in run.updates if update.round == number]
    left_out = [one.client for one in run.exclusions if one.round == number]
    text = f"Round {number} of {total}: {len(answered)} of {plural(sampled, 'client')} answered"
    if left_out:
        text += f", {len(left_out)} left out"
    if any(end.round == number for end in run.rounds):
        scored = {e.active_experts for e in run.evaluations if e.round == number}
        text += f". The new model is scored on held-out rows: {plural(len(scored), 'tier')} done"
    bar = stacked_bar(
        [("answered", _ANSWERED, len(answered)), ("left out", _LEFT_OUT, len(left_out))], sampled
    )
    return [element("p", text, "."), element("div", bar, class_="progress"), *_pace(run, total - number + 1)]


def _pace(run: Run, rounds_left: int) -> list[Markup]:
    """Show how long a round takes, from those that are done."""
    if not run.rounds:
        return []
    mean = sum(end.seconds for end in run.rounds) / len(run.rounds)
    left = f"{plural(rounds_left, 'round')} to go: about {duration(mean * rounds_left)}"
    return [note(f"The clients of a round take {duration(mean)}; {left}.")]
