"""Sites that hold the rows of a run's clients, their hub, and the run over them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from tests.engines_here import ThreadEngine, write_site
from tests.tiny_runs import SETTINGS, invoke, set_options, tiny_config

from fedflame.commands.run import print_run
from fedflame.engines.hub import Hub, HubRounds
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run_folder import Existing
from fedflame.experiment.sites import Sites

KS = {"north": 4, "south": 2, "west": 1}
"""Three sites, and the k of each: that of the tiny run's client in its place."""
NAMES = tuple(KS)


def make_sites(model: Path, folder: Path, ks: Mapping[str, int], *overrides: str) -> dict[str, Path]:
    """What `fedflame split` gives each site, in client order, and the site's file beside it."""
    settings = set_options(*SETTINGS, *overrides)
    told = invoke("split", "--output-dir", folder / "silos", "--model", model, *settings)
    assert told.exit_code == 0, told.output
    models = {str(model): str(model)}
    return {
        name: write_site(folder / name, name, folder / "silos" / f"client-{client}.jsonl", k, models)
        for client, (name, k) in enumerate(ks.items())
    }


def a_hub(sites: Iterable[str], **rounds: float) -> Hub:
    return Hub(sites=tuple(sites), rounds=HubRounds(**rounds))


def run_over(
    engine: ThreadEngine, hub: Hub, model: Path, run: Path, *overrides: str, existing: Existing = "refuse"
) -> str:
    """Run over the sites of the hub and return what the console showed."""
    shown = io.StringIO()
    config = tiny_config(model, run, *overrides)
    print_run(prepare(config, existing, Sites(hub, engine)), "", Console(file=shown, width=200))
    return shown.getvalue()
