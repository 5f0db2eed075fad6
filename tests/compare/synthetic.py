"""A comparison whose every number can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

from fedflame.compare.comparison import Comparison
from fedflame.compare.devices import ClientWork, Devices
from fedflame.compare.grid import Cell, Grid, Setting
from fedflame.compare.results import CellResult, Deployed
from fedflame.config.load import load_config
from fedflame.report.events import Evaluation

BUDGETS = (4, 1)
FLOPS = {4: 40.0, 1: 10.0}
ROUNDS = 2


def a_cell(method: str, seed: int, setting: Setting = ()) -> Cell:
    folder = Path("runs/synthetic/cells") / "-".join([method, str(seed), *(value for _, value in setting)])
    return Cell(method, setting, load_config(None, [f"seed={seed}"]), folder)


def a_result(cell: Cell, loss: float, trained: dict[int, int], tokens: int = 100) -> CellResult:
    """Loss `loss` + 1 at k = 1, one more a round earlier; exact match at the start and the end only."""
    evaluations = [
        Evaluation(at, k, None, loss + (k == 1) + ROUNDS - at, 0.25 * at if at in (0, ROUNDS) else None, None)
        for at in range(ROUNDS + 1)
        for k in BUDGETS
    ]
    clients = [
        ClientWork(at, client, k, trained[k], tokens, 2.0, tokens * FLOPS[trained[k]], 30, 20)
        for at in range(1, ROUNDS + 1)
        for client, k in enumerate(BUDGETS)
    ]
    # Where both train k = 4 the weak device has the first 2 ranks: half a nat worse at 95 % of the cost.
    weak = (1, loss + 1, 0.25) if trained[1] == 1 else (4, loss + 0.5, 0.95)
    deployed = [
        Deployed(4, 4, 8, 1.0, loss, 0.5, None),
        Deployed(1, weak[0], 8 if weak[0] == 1 else 2, weak[2], weak[1], None, None),
    ]
    environment = {"python": "3.11", "dtype": "float32"}
    return CellResult(
        cell.name, cell.method, dict(cell.setting), cell.config.seed,
        "exact_match", evaluations, clients, FLOPS, environment, deployed, {"seed": cell.config.seed},
    )  # fmt: skip


OWN, ALL = {4: 4, 1: 1}, {4: 4, 1: 4}
"""What the devices train by their budget: each what it affords, or both k = 4."""


def synthetic() -> Comparison:
    """`own` against `all`: losses 1.0, 1.3, 1.6 and 2.0, 2.2, 2.7 at k = 4 over three seeds."""
    losses = {"all": (2.0, 2.2, 2.7), "own": (1.0, 1.3, 1.6)}
    trained = {"all": ALL, "own": OWN}
    cells = [a_cell(method, seed) for seed in range(3) for method in losses]
    grid = Grid(
        Path("runs/synthetic"), "all", list(losses), cells, Devices(flops_per_second=40, bytes_per_second=5)
    )
    results = {
        cell.name: a_result(cell, losses[cell.method][cell.config.seed], trained[cell.method])
        for cell in cells
    }
    return Comparison(grid, results, {})
