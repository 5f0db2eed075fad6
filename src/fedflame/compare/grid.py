"""The grid file: methods, axes and devices in TOML; every combination is a cell, which is one run.

Identity of a cell is what its run reads of the resolved configuration: its name ends in a digest of that,
so what a grid has in common with an earlier one is found again, and nothing else is.
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

from fedflame.compare.devices import Devices
from fedflame.config.load import load_config
from fedflame.config.run_config import SCHEMA_VERSION, RunConfig
from fedflame.config.settings import flat, read_toml, refuse_unknown_key, validated
from fedflame.errors import UserError

Setting = tuple[tuple[str, str], ...]
"""The value on each axis but the seed's, as (key, value)."""

_METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_VALUE_IN_NAME = 24
"""Characters of a value that go into a folder's name."""


class _GridFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    output_dir: str = "runs/compare"
    baseline: str = ""
    base: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]]
    grid: dict[str, Any] = {}
    devices: Devices = Devices()


@dataclass(frozen=True)
class Cell:
    """One method with one value on every axis."""

    method: str
    setting: Setting
    config: RunConfig
    """Resolved; its output_dir is the cell's run folder."""
    folder: Path
    """Holds the run folder, log.txt, error.txt if the run failed, and results until taken over."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def run(self) -> Path:
        return self.folder / "run"


@dataclass(frozen=True)
class Grid:
    """A grid file, resolved."""

    output_dir: Path
    baseline: str
    methods: list[str]
    cells: list[Cell]
    """In the order of the axes in the file, the first slowest; methods fastest."""
    devices: Devices

    def settings(self) -> list[Setting]:
        """Each setting once, in order."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))


def read_grid(
    path: Path, overrides: Sequence[str], output_dir: str | None = None, baseline: str | None = None
) -> Grid:
    """The grid of a TOML file with every cell's configuration checked.

    Args:
        path: the grid file.
        overrides: `section.key=value` for every cell, over whatever the file says.
        output_dir: instead of the file's; None for that.
        baseline: the same.

    Raises:
        UserError: a file that is missing or broken, a key or value that is not allowed, a method that
            sets an axis, or two cells that are the same run.
    """
    values = read_toml(path)
    for key in values:
        refuse_unknown_key(key, _GridFile.model_fields, f"grid file {path}")
    file = validated(_GridFile, {"methods": {}, **values}, f"grid file {path}")
    baseline = baseline or file.baseline or next(iter(file.methods), "")
    _check_methods(file, baseline)
    folder = Path(output_dir or file.output_dir)
    axes = [_axis(key, points) for key, points in flat(file.grid).items()]
    cells = [
        _cell(folder, method, {**flat(file.base), **flat(file.methods[method])}, point, overrides)
        for point in _combinations(axes)
        for method in file.methods
    ]
    _refuse_duplicates(cells)
    return Grid(folder, baseline, list(file.methods), cells, file.devices)


def _check_methods(file: _GridFile, baseline: str) -> None:
    if not file.methods:
        raise UserError("grid: no method; each is a table such as [methods.flame]")
    if baseline not in file.methods:
        raise UserError(
            f"grid: baseline = {baseline!r}: must be one of the methods {', '.join(file.methods)}"
        )
    if bad := [name for name in file.methods if not _METHOD_NAME.fullmatch(name)]:
        raise UserError(f"grid: method {bad[0]!r}: a name may have letters, digits and . _ - only")


def _axis(key: str, points: Any) -> list[dict[str, Any]]:
    """What each point of an axis sets: one value, or the keys of a table below `key`."""
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
    setting = tuple((key, str(value)) for key, value in point.items() if key != "seed")
    folder = output_dir / "cells" / _name(method, setting, config)
    run = {"output_dir": str(folder / "run")}
    return Cell(method, setting, config.model_copy(update=run), folder)


def _name(method: str, setting: Setting, config: RunConfig) -> str:
    """Readable, and unique by the digest of the configuration."""
    digest = hashlib.blake2b(_identity(config).encode(), digest_size=5).hexdigest()
    parts = [f"{key.rpartition('.')[2]}-{Path(value).name[:_VALUE_IN_NAME]}" for key, value in setting]
    readable = "-".join([method, *parts, f"seed-{config.seed}"])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{readable}-{digest}")


def _identity(config: RunConfig) -> str:
    """The schema version, and what differs from its defaults: options that are off may come and go."""
    values, defaults = _flat_settings(config), _flat_settings(RunConfig())
    if config.method.experts == "in_turn":
        values["strategy.k_rotation"] = config.k_rotation()
    chosen = {key: value for key, value in values.items() if value != defaults[key]}
    return json.dumps([SCHEMA_VERSION, chosen], sort_keys=True)


def _flat_settings(config: RunConfig) -> dict[str, Any]:
    return flat(config.model_dump(exclude={"output_dir"}))


def _refuse_duplicates(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        same = _identity(cell.config)
        if same in seen:
            raise UserError(
                f"grid: cells {seen[same].name} and {cell.name} are the same run; drop one of them"
            )
        seen[same] = cell
