"""`fedflame audit`: what an attacker learns of the rows of a client, with and without privacy."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedflame.commands.progress import say_line
from fedflame.config.run_config import RunConfig
from fedflame.experiment.audit import Audited, audit
from fedflame.report.numbers import MISSING, decimal, percent


def print_audit(config: RunConfig, canaries: int, client: int, console: Console) -> None:
    """Attack the run as it is configured and, if rows or updates are protected, as it would be without."""
    off = config.privacy.model_copy(update={"unit": "none", "secure_aggregation": False})
    ways = {} if config.privacy == off else {"as configured": config}
    ways["without privacy"] = config.model_copy(update={"privacy": off})
    found = {}
    for name, way in ways.items():
        say_line(console, f"running {name}, with {canaries} canaries at client {client}")
        found[name] = audit(way, canaries, client)
    console.print(_table(found))
    for line in _in_words(found):
        say_line(console, line)


def _table(found: dict[str, Audited]) -> Table:
    table = Table(title="Which canaries were trained on, as the hub can tell", box=SIMPLE_HEAD)
    table.title_justify = "left"
    for name in ("run", "AUC", "found at 1 % false", "epsilon proved", "epsilon claimed"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for name, audited in found.items():
        attack, claimed = audited.attack, audited.epsilon
        table.add_row(
            name,
            decimal(attack.auc, 3),
            percent(attack.true_positives),
            f"{attack.proved_epsilon:.2g}",
            MISSING if claimed is None else f"{claimed:.3g}",
        )
    return table


def _in_words(found: dict[str, Audited]) -> list[str]:
    lines = ["AUC 0.5 is guessing; epsilon proved is what these scores refute at 95 % confidence"]
    for name, audited in found.items():
        if audited.epsilon is not None and audited.attack.proved_epsilon > audited.epsilon:
            lines.append(f"{name}: more was proved than is claimed. This is a bug: please report it")
    lines.append(
        "this attack is one of many: what it does not find, another may. Canaries are random letters, and "
        "learned by heart only where rows come again and again"
    )
    return lines
