"""The page of a site, for its administrator: what its trainer has answered, and what its limits leave."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from fedflame.errors import UserError
from fedflame.folder_lock import holder
from fedflame.page_server import as_it_is, remade
from fedflame.report.markup import Markup, element, note, section, table
from fedflame.report.numbers import MISSING, duration, plural, si
from fedflame.report.page import document, header
from fedflame.trainer.budget import speaks_of_privacy, spent_in_words
from fedflame.trainer.journal import FILE_NAME as JOURNAL_FILE
from fedflame.trainer.journal import Answered, read_journal
from fedflame.trainer.ledger import DAY_SECONDS, FILE_NAME, Round, read_ledger
from fedflame.trainer.site import TRAINER_LOCK, Site, SiteLimits, load_site

_KICKER = "fedflame site"
_NO_ANSWERS = ("refused", "failed")
_SHOWN = 20
"""Of the last rounds and refusals."""


def live_site_page(path: Path) -> Callable[[], str]:
    """Return what makes the page of a site, anew where something has changed, also by the minute.

    Raises:
        UserError: the site's file cannot be read.
    """
    state = load_site(path).state_path

    def now() -> object:
        files = [as_it_is(file) for file in (path, state / FILE_NAME, state / JOURNAL_FILE)]
        return *files, holder(state / TRAINER_LOCK), time.time() // 60

    page = remade(partial(site_page, path), now)

    def live() -> str:
        try:
            return page()
        except UserError as error:  # a file was changed since
            return document(path.parent.name, [header(_KICKER, path.parent.name, []), _problem(error)])

    return live


def _problem(error: UserError) -> Markup:
    return section("Now", element("p", f"The site cannot be read: {error}", class_="warning"))


def site_page(path: Path) -> str:
    """Return the page of a site, by its file. It shows nothing that does not lie at the site.

    Raises:
        UserError: the file or the ledger cannot be read.
    """
    site = load_site(path)
    ledger, answers = read_ledger(site.state_path / FILE_NAME), read_journal(site.state_path)
    begun = [one for one in ledger if one.kind == "train"]
    by = holder(site.state_path / TRAINER_LOCK)
    parts = [_head(site, by), _now(begun, answers, by), _runs(begun, answers)]
    parts += [_privacy(site, begun)] if speaks_of_privacy(site, begun) else []
    parts += [_limits(site.limits, ledger, answers, time.time()), _rounds(answers), _refusals(answers)]
    return document(site.name, parts)


def _head(site: Site, by: str) -> Markup:
    k, most = site.trainer.active_experts, site.most_experts
    facts = [
        ("Trainer", f"runs ({by})" if by else "does not run"),
        ("Rows", site.data.dataset_name),
        ("k", str(k) if k == most else f"{k}, at most {most} in turn"),
        ("Device", site.trainer.device),
        ("Models", ", ".join(site.models)),
    ]
    return header(_KICKER, site.name, facts)


def _now(begun: Sequence[Round], answers: Sequence[Answered], by: str) -> Markup:
    """Show whether the trainer runs, and what it has still to answer."""
    state = element("p", "The trainer runs." if by else "The trainer does not run.")
    if not begun:
        return section("Now", state, note("No round has begun yet."))
    last = begun[-1]
    text = f"The last round began at {_when(last.time)}, for run {last.run[:8]}"
    after = [answer for answer in answers if answer.run == last.run and answer.time >= last.time]
    if not after:
        return section("Now", state, note(f"{text}. It has no answer yet."))
    return section("Now", state, note(f"{text}, and was answered at {_when(after[0].time)}."))


def _runs(begun: Sequence[Round], answers: Sequence[Answered]) -> Markup:
    """Show one row per run, the latest first."""
    runs = dict.fromkeys([one.run for one in begun] + [answer.run for answer in answers if answer.run])
    if not runs:
        return section("Runs", note("This site has taken part in no run."))
    headers = [
        "Run",
        "Rounds begun",
        "Answered",
        "Last round",
        "k",
        "Tokens",
        "Time",
        "Scored",
        "Refused",
        "Last answer",
    ]
    rows = [_run_row(run, begun, answers) for run in reversed(runs)]
    since = f"Answers are recorded since {_when(answers[0].time)}." if answers else "No answer is recorded."
    return section(
        "Runs", table(headers, rows), note("A run is named by the first digits of its id. ", since)
    )


def _run_row(run: str, begun: Sequence[Round], answers: Sequence[Answered]) -> list[object]:
    of_run = [answer for answer in answers if answer.run == run]
    updates = [answer for answer in of_run if answer.kind == "update"]
    return [
        run[:8],
        sum(one.run == run for one in begun),
        len(updates),
        max((answer.round for answer in updates), default=MISSING),
        ", ".join(map(str, sorted({answer.active_experts for answer in updates}, reverse=True))) or MISSING,
        si(sum(answer.tokens for answer in updates)),
        duration(sum(answer.seconds for answer in updates)),
        sum(answer.kind == "evaluation" for answer in of_run),
        sum(answer.kind in _NO_ANSWERS for answer in of_run),
        _when(of_run[-1].time) if of_run else MISSING,
    ]


def _privacy(site: Site, begun: Sequence[Round]) -> Markup:
    """Show what private rounds have spent on the rows, and how many had no noise."""
    open_rounds = sum(not one.steps for one in begun)
    try:
        text = f"Of each row, {spent_in_words(begun, site.dataset, site.privacy)}."
    except UserError as error:
        text = f"What was spent cannot be computed: {error}."
    more = (
        f" {plural(open_rounds, 'round')} had no noise: nothing bounds what was told." if open_rounds else ""
    )
    return section("Privacy", note(text, more))


def _limits(limits: SiteLimits, begun: Sequence[Round], answers: Sequence[Answered], now: float) -> Markup:
    """Show each limit with what was asked of it so far, and what it leaves."""
    updates = [answer for answer in answers if answer.kind == "update"]
    today = Counter(one.kind for one in begun if one.time > now - DAY_SECONDS)
    used: dict[str, float] = {
        "max_runs": len({one.run for one in begun}),
        "max_rounds_per_day": max(today.values(), default=0),
    }
    largest: dict[str, float] = {
        "max_rounds": max((answer.round for answer in updates), default=0),
        "max_steps": max((answer.steps for answer in updates), default=0),
        "max_tokens": max((answer.tokens for answer in updates), default=0),
        "max_seconds_per_round": max((answer.seconds for answer in updates), default=0),
    }
    rows = []
    for key, allowed in limits.model_dump().items():
        off = key.startswith("max_") and not allowed
        shown = _value(allowed) if not off else "as the machine has" if key == "max_memory" else "no limit"
        left = f"{max(0, allowed - used[key]):,}" if key in used and not off else MISSING
        so_far = used.get(key, largest.get(key))
        rows.append([key, shown, MISSING if so_far is None else _value(so_far), left])
    text = "So far: of runs, all; of rounds per day, those trained in the last 24 hours, or those scored if "
    text += "these are more; else the largest of a round, tokens without padding."
    return section("Limits", table(["Limit", "Allowed", "So far", "Left"], rows), note(text))


def _rounds(answers: Sequence[Answered]) -> Markup:
    updates = [answer for answer in answers if answer.kind == "update"][-_SHOWN:]
    if not updates:
        return section("Last rounds", note("No round has been answered yet."))
    headers = ["Answered at", "Run", "Round", "k", "Steps", "Tokens", "Time", "Tokens / s"]
    rows = [
        [
            _when(answer.time),
            answer.run[:8],
            answer.round,
            answer.active_experts,
            f"{answer.steps:,}",
            si(answer.tokens),
            duration(answer.seconds),
            si(answer.tokens / answer.seconds) if answer.seconds else MISSING,
        ]
        for answer in reversed(updates)
    ]
    return section("Last rounds", table(headers, rows))


def _refusals(answers: Sequence[Answered]) -> Markup:
    refused = [answer for answer in answers if answer.kind in _NO_ANSWERS]
    if not refused:
        return section("Last refusals", note("Nothing has been refused, and nothing has failed."))
    rows = [
        [_when(answer.time), answer.run[:8] or MISSING, answer.kind, answer.reason]
        for answer in reversed(refused[-_SHOWN:])
    ]
    headers = ["At", "Run", "Kind", "Reason"]
    said = note(f"{plural(len(refused), 'request')} in all.")
    return section("Last refusals", table(headers, rows, "rounds"), said)


def _value(value: object) -> str:
    return f"{value:,.12g}" if isinstance(value, int | float) else str(value)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
