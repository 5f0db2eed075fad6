"""Sites that hold the rows of a run's clients, the run over them, and the run that skips some of them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console
from tests.engines_here import ThreadEngine, write_site
from tests.tiny_runs import SETTINGS, invoke, tiny_config

from fedflame.clients.answers import Answer, OnStep
from fedflame.clients.local import LocalClients
from fedflame.commands.run import print_run
from fedflame.engines.hub import Hub, HubRounds
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run_folder import Existing
from fedflame.experiment.sites import Sites
from fedflame.wire.codec import decode_plan

Which = tuple[int, int]
"""Round and client."""


def skipping(monkeypatch: pytest.MonkeyPatch, skipped: Iterable[Which]) -> None:
    """Clients of one process give no answer for these rounds."""
    known, answer = frozenset(skipped), LocalClients.answer

    def told_to_skip(self: LocalClients, plan: bytes, on_step: OnStep) -> Answer:
        asked = decode_plan(plan)
        skip = (asked.round, asked.client) in known
        return Answer(b"", "told to skip", 0.0) if skip else answer(self, plan, on_step)

    monkeypatch.setattr(LocalClients, "answer", told_to_skip)


def make_sites(model: Path, folder: Path, ks: Iterable[int], *overrides: str) -> dict[str, Path]:
    """Sites with the rows of each client of the run, in client order."""
    settings = [part for setting in (*SETTINGS, *overrides) for part in ("--set", setting)]
    told = invoke("split", "--output-dir", folder / "silos", "--model", model, *settings)
    assert told.exit_code == 0, told.output
    return {
        f"site-{client}": write_site(
            folder / f"site-{client}", f"site-{client}", folder / "silos" / f"client-{client}.jsonl", k,
            {str(model): str(model)},
        )
        for client, k in enumerate(ks)
    }  # fmt: skip


def run_over(
    engine: ThreadEngine, model: Path, run: Path, *overrides: str, existing: Existing = "refuse"
) -> str:
    hub = Hub(sites=tuple(sorted(engine.reachable)), rounds=HubRounds(rejoin_timeout=0, round_timeout=60))
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    print_run(prepare(tiny_config(model, run, *overrides), existing, Sites(hub, engine)), "", console)
    return shown.getvalue()
