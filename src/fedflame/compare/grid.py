"""Read a grid file (TOML) with methods, axes and devices. Every combination is a cell, which is one run.

A cell is identified by the settings that its run uses: its name ends in a digest of them. So a changed grid
file finds the cells that it has in common with an earlier one, and runs only the others.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fedflame.compare.bounds import Bound, bound_settings
from fedflame.compare.devices import Devices
from fedflame.config.load import load_config
from fedflame.config.run_config import BESIDE_RESULTS, SCHEMA_VERSION, WITHOUT, RunConfig
from fedflame.config.settings import flat, refuse_unknown_key, validated
from fedflame.errors import UserError
from fedflame.reading import read_toml

Setting = tuple[tuple[str, str], ...]
"""The values on all axes except the seed, as (key, value) pairs."""

SCORED_BY_CLIENTS = ("server.fraction_evaluate",)
"""Set to 1 where there are bounds, unless the grid says otherwise."""
_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VALUE_IN_NAME = 24
"""Largest number of characters of a value in a folder's name."""


class _GridFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    output_dir: str = "runs/compare"
    baseline: str = ""
    base: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]]
    bounds: list[Bound] = []
    grid: dict[str, Any] = {}
    devices: Devices = Devices()


@dataclass(frozen=True)
class Cell:
    """One method with one value on each axis."""

    method: str
    setting: Setting
    config: RunConfig
    """The resolved configuration; its output_dir is the cell's run folder."""
    folder: Path
    """Contains the run folder and log.txt; error.txt if the run failed; results until they are taken over."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def run(self) -> Path:
        return self.folder / "run"


@dataclass(frozen=True)
class Grid:
    """The content of a grid file, resolved into cells."""

    output_dir: Path
    baseline: str
    methods: list[str]
    cells: list[Cell]
    """In the order of the axes in the file; the first axis varies slowest, methods vary fastest. The bounds
    of a point come after its methods."""
    devices: Devices

    def settings(self) -> list[Setting]:
        """Return each setting once, in order."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))


def read_grid(
    path: Path, overrides: Sequence[str], output_dir: str | None = None, baseline: str | None = None
) -> Grid:
    """Read a grid file and check the configuration of every cell.

    Args:
        path: the grid file.
        overrides: `section.key=value` for every cell; they override the file.
        output_dir: replaces the file's output_dir unless None.
        baseline: replaces the file's baseline unless None.

    Raises:
        UserError: the file is missing or broken, a key or value is not allowed, a method sets an axis, or two
            cells are the same run.
    """
    values = read_toml(path)
    for key in values:
        refuse_unknown_key(key, _GridFile.model_fields, f"grid file {path}")
    file = validated(_GridFile, {"methods": {}, **values}, f"grid file {path}")
    baseline = baseline or file.baseline or next(iter(file.methods), "")
    _check_methods(file, baseline)
    folder = Path(output_dir or file.output_dir)
    axes = [_axis(key, points) for key, points in flat(file.grid).items()]
    scored = dict.fromkeys(SCORED_BY_CLIENTS, 1) if file.bounds else {}
    base = {**scored, **flat(file.base)}
    cells = []
    for point in _combinations(axes):
        of_point = [
            _cell(folder, method, {**base, **flat(file.methods[method])}, point, overrides)
            for method in file.methods
        ]
        cells += of_point
        for bound in file.bounds:
            cells += _bound_cells(folder, bound, base, point, overrides)
    _refuse_duplicates(cells)
    return Grid(folder, baseline, list(file.methods), cells, file.devices)


def _check_methods(file: _GridFile, baseline: str) -> None:
    if not file.methods:
        raise UserError("grid: no method; each is a table such as [methods.flame]")
    if baseline not in file.methods:
        raise UserError(
            f"grid: baseline = {baseline!r}: must be one of the methods {', '.join(file.methods)}"
        )
    if both := [name for name in file.methods if name in file.bounds]:
        raise UserError(f"grid: method {both[0]!r}: a bound has this name")
    if bad := [name for name in file.methods if not _METHOD_NAME.fullmatch(name)]:
        raise UserError(f"grid: method {bad[0]!r}: a name may have letters, digits and . _ - only")


def _bound_cells(
    output_dir: Path, bound: Bound, base: dict[str, Any], point: dict[str, Any], overrides: Sequence[str]
) -> list[Cell]:
    """Return the cells of a bound: one for all rows, or one for each client alone."""
    lines = [f"{key}={value}" for key, value in {**base, **point}.items()]
    plain = [line for line in [*lines, *overrides] if not line.strip().startswith("strategy.")]
    config = load_config(None, plain)
    if config.server.fraction_evaluate < 1:
        raise UserError("grid: bounds are scored by every client: server.fraction_evaluate must be 1")
    if axes := [key for key in point if key.startswith("strategy.")]:
        raise UserError(f"grid: {axes[0]} is an axis, but no setting of bounds; make it methods instead")
    cells = []
    for name, settings in bound_settings(bound, config).items():
        whole = load_config(None, [*plain, *settings])
        cells.append(_placed(output_dir, bound, name, point, whole))
    return cells


def _axis(key: str, points: Any) -> list[dict[str, Any]]:
    """Return what each point of an axis sets: the value of `key`, or the keys of a table below `key`."""
    if not isinstance(points, list) or not points:
        raise UserError(f"grid: {key} = {points!r}: must be a list of at least one value")
    return [flat({key: point}) for point in points]


def _combinations(axes: list[list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for points in itertools.product(*axes):
        yield {key: value for point in points for key, value in point.items()}


def _cell(
    output_dir: Path, method: str, given: dict[str, Any], point: dict[str, Any], overrides: Sequence[str]
) -> Cell:
    if both := sorted(given.keys() & point.keys()):
        raise UserError(f"grid: {both[0]} is an axis of [grid]; neither [base] nor a method may set it")
    lines = [*(f"{key}={value}" for key, value in {**given, **point}.items()), *overrides]
    if any(line.partition("=")[0].strip() == "output_dir" for line in lines):
        raise UserError("grid: output_dir is set once, at the top of the file or by --output-dir")
    try:
        config = load_config(None, lines)
    except UserError as error:
        where = ", ".join([f"method {method}", *(f"{key} = {value}" for key, value in point.items())])
        raise UserError(f"{error} ({where})") from error
    return _placed(output_dir, method, method, point, config)


def _placed(output_dir: Path, method: str, name: str, point: dict[str, Any], config: RunConfig) -> Cell:
    """Return the cell with a folder that begins with this name."""
    setting = tuple((key, str(value)) for key, value in point.items() if key != "seed")
    folder = output_dir / "cells" / _name(name, setting, config)
    run = {"output_dir": str(folder / "run")}
    return Cell(method, setting, config.model_copy(update=run), folder)


def _name(method: str, setting: Setting, config: RunConfig) -> str:
    """Return a readable folder name that ends in a digest of the configuration."""
    digest = hashlib.blake2b(_identity(config).encode(), digest_size=5).hexdigest()
    parts = [f"{key.rpartition('.')[2]}-{Path(value).name[:_VALUE_IN_NAME]}" for key, value in setting]
    readable = "-".join([method, *parts, f"seed-{config.seed}"])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{readable}-{digest}")


def _identity(config: RunConfig) -> str:
    """Return the schema version and the settings that are not defaults: a new option changes no name.

    A new option whose default changes runs is named unless it is set to what was run `WITHOUT` it.
    """
    values, defaults = _flat_settings(config), _flat_settings(RunConfig()) | WITHOUT
    if config.method.experts == "in_turn":
        values["strategy.k_rotation"] = config.k_rotation()
    chosen = {key: value for key, value in values.items() if value != defaults[key]}
    return json.dumps([SCHEMA_VERSION, chosen], sort_keys=True)


def _flat_settings(config: RunConfig) -> dict[str, Any]:
    return flat(config.model_dump(exclude=BESIDE_RESULTS))


def _refuse_duplicates(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        same = _identity(cell.config)
        if same in seen:
            raise UserError(
                f"grid: cells {seen[same].name} and {cell.name} are the same run; drop one of them"
            )
        seen[same] = cell
