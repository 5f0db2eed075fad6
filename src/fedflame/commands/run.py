"""`fedflame run`: what a person sees of one run, from the tables before it to those after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from fedflame.base.device import device_in_words
from fedflame.commands.progress import reporter, say_line, say_used_rounds
from fedflame.commands.tables import cost_table, partition_table, print_privacy, print_rows, result_table
from fedflame.experiment.prepare import Prepared
from fedflame.experiment.private_clients import private_clients
from fedflame.experiment.run import Begun, run_experiment
from fedflame.report.records import read_run
from fedflame.server.progress import Reporter

if TYPE_CHECKING:
    from fedflame.data.federation import Federation
    from fedflame.experiment.assemble import Experiment

SKIPPED_ROWS_SHOWN = 5
GOES_ON = "--resume with a larger server.early_stopping_patience goes on"


def print_run(prepared: Prepared, config_text: str, console: Console, workers: int = 1) -> None:
    """Run it to its end, and print what is found, what happens and what came of it.

    Raises UserError; see `run_experiment`.
    """

    @contextmanager
    def watch(begun: Begun) -> Iterator[Reporter]:
        if begun.starting_adapter:
            say_line(console, f"goes on from {begun.starting_adapter}")
        _print_experiment(begun.experiment, begun.sites, console)
        with reporter(console, begun.remaining_batches) as progress:
            yield progress

    written = run_experiment(prepared, config_text=config_text, workers=workers, watch=watch)
    if written.note:
        say_line(console, written.note)
    recorded = read_run(written.run)
    console.print(result_table(recorded))
    if recorded.epsilon is not None:
        delta = prepared.config.privacy.delta
        say_line(
            console,
            f"privacy: of each row at most epsilon = {recorded.epsilon:.3g} was told, delta = {delta:g}",
        )
    if recorded.stop:
        say_line(console, f"stopped after round {recorded.stop.round}: {recorded.stop.reason}; {GOES_ON}")
    say_used_rounds(written.run, console)
    files = [written.run / name for name in ("report.html", "adapter")]
    say_line(console, "\n".join(f"{path.stem}: {path}" for path in files if path.exists()))


def _print_experiment(experiment: Experiment, sites: tuple[str, ...], console: Console) -> None:
    import torch

    config, cost = experiment.config, experiment.cost
    print_rows(experiment.federation.columns, experiment.encoded.cut_prompts, console)
    _print_skipped(experiment.federation, console)
    threads = torch.get_num_threads()
    say_line(
        console,
        f"model {config.model.model_name_or_path} in {experiment.dtype.name} ({experiment.dtype.reason}), "
        f"{threads} thread{'s' * (threads > 1)}",
    )
    say_line(console, f"device {device_in_words(experiment.device)}")
    say_line(console, f"rows in {experiment.encoder.template.in_words}")
    clients = experiment.clients
    console.print(partition_table(clients, cost.clients, experiment.encoded.truncated, sites))
    console.print(cost_table(cost))
    if config.privacy.unit != "none" and not sites:
        rows = [len(part) for part in experiment.federation.parts]
        privacy = private_clients(config, experiment.shape, cost, rows)
        print_privacy(privacy, config.privacy.delta, console)


def _print_skipped(federation: Federation, console: Console) -> None:
    for row in federation.skipped[:SKIPPED_ROWS_SHOWN]:
        say_line(console, f"skipped {row.where}: {row.reason}")
    if federation.skipped:
        console.print(f"{len(federation.skipped)} rows skipped (all in skipped.jsonl of the run folder)")
