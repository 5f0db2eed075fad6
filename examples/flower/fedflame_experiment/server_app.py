"""A ServerApp that runs fedflame's rounds over the grid that Flower passes to it."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from pydantic import TypeAdapter
from rich.console import Console

from fedflame.commands.run import print_run
from fedflame.config.load import load_config
from fedflame.engines.flower.grid_engine import GridEngine
from fedflame.engines.hub import load_hub
from fedflame.experiment.prepare import prepare
from fedflame.experiment.run_folder import Existing
from fedflame.experiment.sites import Sites

FOLDER = Path(__file__).parents[1]
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config names, and write its run folder."""
    given = {name: str(value) for name, value in context.run_config.items()}
    experiment, hub = FOLDER / given["experiment"], load_hub(FOLDER / given["hub"])
    config = load_config(experiment, [f"output_dir={given['output-dir']}"])
    existing: Existing = TypeAdapter(Existing).validate_python(given["existing"])
    prepared = prepare(config, existing, Sites(hub, GridEngine(grid, hub)))
    print_run(prepared, experiment.read_text(), Console())
