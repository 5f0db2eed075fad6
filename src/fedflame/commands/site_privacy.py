"""`fedflame site privacy`: what the private rounds of a site have spent, by data set and run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedflame.commands.check import Finding
from fedflame.commands.progress import say_line
from fedflame.errors import UserError
from fedflame.privacy.accounting import epsilon_of, require_accounting
from fedflame.report.numbers import plural
from fedflame.trainer.budget import problem_of_delta, spendings, spent_in_words
from fedflame.trainer.ledger import FILE_NAME, Round, read_ledger
from fedflame.trainer.site import Site


def print_privacy_of(site: Site, console: Console) -> None:
    """Print what was spent. Raises UserError if the ledger cannot be read, or epsilon not be computed."""
    rounds = [known for known in read_ledger(site.state_path / FILE_NAME) if known.kind == "train"]
    private = [known for known in rounds if known.steps]
    if private:
        console.print(_table(private, site.privacy.delta))
    for data in sorted({site.dataset, *(known.data for known in private)}):
        say_line(console, f"{data}: {spent_in_words(private, data, site.privacy)}")
    if others := len(rounds) - len(private):
        say_line(console, f"{plural(others, 'round')} without noise: nothing bounds what was told")
    if not site.privacy.only_private:
        say_line(console, "plans without noise are carried out, too; privacy.require = true refuses them")


def privacy_finding(site: Site) -> Iterator[Finding]:
    """Yield what is left for private runs, for a site whose file speaks of privacy."""
    if not site.privacy.only_private:
        return
    try:
        require_accounting()
        rounds = read_ledger(site.state_path / FILE_NAME)
    except UserError as error:
        yield Finding(False, str(error))
        return
    epsilon = epsilon_of(spendings(rounds, site.dataset), site.privacy.delta)
    good = not site.privacy.max_epsilon or epsilon < site.privacy.max_epsilon
    advice = "no private run is carried out any more: allow more (privacy.max_epsilon), or take other rows"
    yield Finding(
        good, f"privacy: {spent_in_words(rounds, site.dataset, site.privacy)}", "" if good else advice
    )


def delta_finding(site: Site, units: int) -> Iterator[Finding]:
    """Yield what speaks against the delta of a site with so many rows, or persons, and a limit."""
    if problem := problem_of_delta(site.privacy, units):
        yield Finding(False, problem, "no private run is carried out: set a smaller one")


def _table(private: Sequence[Round], delta: float) -> Table:
    table = Table(title="Private rounds by run", box=SIMPLE_HEAD, title_justify="left")
    for name in ("run", "last", "rounds", "steps", "noise", "sampled", "epsilon"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for run, data in dict.fromkeys((known.run, known.data) for known in private):
        own = [known for known in private if (known.run, known.data) == (run, data)]
        last = own[-1]
        cells = (
            run[:8],
            datetime.fromtimestamp(last.time).strftime("%Y-%m-%d"),
            str(len(own)),
            f"{sum(known.steps for known in own):,}",
            f"{last.noise_multiplier:.3g}",
            f"{100 * last.sampling_rate:.2g} %",
            f"{epsilon_of(spendings(own, data), delta):.3g}",
        )
        table.add_row(*map(Text, cells))
    return table
