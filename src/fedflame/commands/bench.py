"""`fedflame bench`: time and memory of one MoE block with expert LoRA, beside the other ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from fedflame.bench.block import Geometry, frozen_model
from fedflame.bench.measurement import measure, one_thread, require_equal
from fedflame.bench.methods import METHODS
from fedflame.commands.tables import bench_table
from fedflame.config.lists import parse_integers
from fedflame.errors import UserError
from fedflame.experiment.environment import environment
from fedflame.json_text import to_text


def print_bench(
    geometry: Geometry,
    tokens: str,
    active_experts: str,
    methods: str,
    repeats: int,
    as_json: bool,
    console: Console,
) -> None:
    """Measure and print a table or JSON.

    Args:
        geometry: the block.
        tokens: batch sizes such as "512,2048".
        active_experts: the k such as "8,1".
        methods: names of `METHODS`, comma-separated.
        repeats: timed passes of each method; the median counts.
        as_json: print one JSON object, the environment with it.
        console: where the table goes.

    Raises:
        UserError: sizes or methods that there are not, or `ours` and `composed` that disagree.
    """
    names = _names(methods)
    sizes = [(count, k) for count in _numbers("--tokens", tokens) for k in _active(active_experts, geometry)]
    with one_thread():
        machine = environment()
        with _progress(console, as_json, len(sizes) * len(names) * (1 + repeats)) as on_pass:
            measurements = _measure_all(geometry, names, sizes, repeats, on_pass)
    if geometry.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    if as_json:
        settings = {"geometry": asdict(geometry), "repeats": repeats, "environment": machine}
        print(to_text({**settings, "measurements": measurements}, indent=1))
        return
    console.print(bench_table(measurements, geometry.device))
    console.print("\n".join(f"{name}: {METHODS[name].description}" for name in names))


def _measure_all(
    geometry: Geometry,
    names: list[str],
    sizes: list[tuple[int, int]],
    repeats: int,
    on_pass: Callable[[str], None],
) -> list[dict[str, Any]]:
    frozen = frozen_model(geometry)
    built = dict.fromkeys(["ours", "composed", *names])  # the first two also check each other
    models = {name: METHODS[name].build(frozen, geometry) for name in built}
    measurements = []
    for tokens, k in sizes:
        passes = {name: METHODS[name].prepare(models[name], geometry, tokens, k) for name in built}
        require_equal(passes["ours"], passes["composed"])
        measured = measure({name: passes[name] for name in names}, geometry.device, repeats, on_pass)
        size = {"tokens": tokens, "active_experts": k}
        measurements += [{**size, "method": name, **asdict(value)} for name, value in measured.items()]
    return measurements


@contextmanager
def _progress(console: Console, as_json: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says which pass runs; nothing otherwise."""
    if as_json or not console.is_terminal:
        yield lambda name: None
        return
    done = 0
    with console.status("building the block") as status:

        def on_pass(name: str) -> None:
            nonlocal done
            done += 1
            status.update(f"pass {done} of {total}: {name}")

        yield on_pass


def _names(methods: str) -> list[str]:
    names = [name.strip() for name in methods.split(",")]
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods {name!r}: must be of {', '.join(METHODS)}")
    return names


def _active(active_experts: str, geometry: Geometry) -> list[int]:
    numbers = _numbers("--active-experts", active_experts)
    if max(numbers) > geometry.num_experts:
        raise UserError(
            f"--active-experts {max(numbers)}: must be between 1 and {geometry.num_experts} (--num-experts)"
        )
    return numbers


def _numbers(option: str, text: str) -> list[int]:
    try:
        return list(parse_integers(text))
    except ValueError as error:
        raise UserError(f"{option} {text!r}: {error}") from error
