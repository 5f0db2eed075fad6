"""README.md from the results: what was to be shown, then the tables of every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from goals import Results, goals_table
from introduction import INTRODUCTION
from markdown import table

Row = dict[str, Any]
NOTHING = """## Results

Nothing has been measured yet: there are no results in this folder.
"""


def readme(results: Path) -> str:
    """The introduction, and a section for every card whose results are in the folder."""
    files = sorted(path for path in results.glob("*.json") if not path.name.endswith(".partial.json"))
    sections = [card_section(json.loads(path.read_text())) for path in files] or [NOTHING]
    return "\n".join([INTRODUCTION, *sections])


def card_section(results: Results) -> str:
    (device,) = results["device"]["tables"]["device"]
    parts = [f"## {device.get('gpu', device['processor'])}\n", origin(device), goals_table(results)]
    for title, stage, name, show in TABLES:
        rows = results.get(stage, {}).get("tables", {}).get(name)
        if rows:
            parts += [f"### {title}\n", show(rows)]
    return "\n".join([*parts, "### The stages\n", stages_table(results)])


def origin(device: Row) -> str:
    names = ("cuda", "driver", "python", "torch", "triton", "transformers", "peft")
    versions = ", ".join(f"{name} {device[name]}" for name in names if device.get(name))
    memory = f"{device['gpu_memory'] / 1e9:.0f} GB; " if "gpu_memory" in device else ""
    return f"{memory}{versions}; {device['date'][:10]}.\n"


def stages_table(results: Results) -> str:
    cells = []
    for name, found in results.items():
        failed = "; ".join(f"{one['what']}: {one['message']}" for one in found["failures"])
        cells.append((name, f"{found['seconds']:.0f}", found["begun"], " ".join(failed.split())[:400]))
    return table(("stage", "seconds", "begun", "failed"), cells)


def ceilings(rows: list[Row]) -> str:
    (row,) = rows
    return (
        f"One large bfloat16 product: {row['product_flops'] / 1e12:.3g} TFLOP/s. "
        f"Copy: {row['copy_bytes_per_second'] / 1e12:.3g} TB/s read and written.\n"
    )


def checks(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        met = "met" if row["error"] <= row["allowed"] else "**missed**"
        cells.append((row["check"], f"{row['error']:.1e}", f"{row['allowed']:.1e}", met))
    return table(("check", "error", "allowed", ""), cells)


def waits(rows: list[Row]) -> str:
    return table(("step", "waits"), [(row["step"], sum(row["waits"].values())) for row in rows])


def waiting_places(rows: list[Row]) -> str:
    places = {place: count for row in rows for place, count in row.get("waits", {}).items()}
    return table(("place, innermost call first", "times"), list(places.items())) if places else "Nowhere.\n"


def products(rows: list[Row]) -> str:
    def cell(row: Row) -> str:
        return f"{row['seconds'] * 1e3:.3g} ({row['of_ceiling']:.0%})"

    return pivot(rows, ("product", "by"), ("tokens", "active_experts"), cell)


def block_times(rows: list[Row]) -> str:
    seconds = {(row["tokens"], row["active_experts"], row["method"]): row["seconds"] for row in rows}

    def cell(row: Row) -> str:
        ours = "ours-captured" if row["method"].endswith("-captured") else "ours"
        times = row["seconds"] / seconds[row["tokens"], row["active_experts"], ours]
        return f"{row['seconds'] * 1e3:.3g} ({row['of_ceiling']:.0%}), {times:.2f}"

    return pivot(rows, ("tokens", "active_experts"), ("method",), cell)


def block_memory(rows: list[Row]) -> str:
    def cell(row: Row) -> str:
        return f"{row['saved_bytes'] / 1e6:,.0f}, {row['peak_bytes'] / 1e6:,.0f}"

    return pivot(rows, ("tokens", "active_experts"), ("method",), cell)


def warm_up(rows: list[Row]) -> str:
    cells = [(row["tokens"], row["active_experts"], f"{row['seconds']:.1f}") for row in rows]
    return table(("tokens", "k", "seconds"), cells)


def model(rows: list[Row]) -> str:
    (row,) = rows
    size, seconds = row["resident_bytes"] / 1e9, row["build_seconds"]
    return f"Model, adapter and moments take {size:.2f} GB, and {seconds:.0f} s to build.\n"


def steps(rows: list[Row]) -> str:
    names = ("tokens", "checkpointing", "launched", "k", "ms", "tokens/s", "TFLOP", "of the product's rate")
    more = ("peak, GB", "launches", "copies", "idle", "waits", "experts used", "warm-up, s")
    return table((*names, *more), map(step_cells, rows))


def step_cells(row: Row) -> Sequence[object]:
    return (
        row["tokens"],
        row["gradient_checkpointing"],
        row["launched"],
        row["active_experts"],
        f"{row['seconds'] * 1e3:.4g}",
        f"{row['tokens'] / row['seconds']:,.0f}",
        f"{row['training_flops'] / 1e12:.3g}",
        f"{row['of_ceiling']:.1%}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        row.get("launches", ""),
        row.get("copies", ""),
        f"{max(0.0, 1 - row['busy_seconds'] / row['seconds']):.0%}" if "busy_seconds" in row else "",
        sum(row["waits"].values()) if "waits" in row else "",
        f"{row['experts_used']:.0%}",
        f"{row['warm_up_seconds']:.1f}",
    )


def compiler(rows: list[Row]) -> str:
    return table(("graphs", "breaks"), [(row["graphs"], row["breaks"]) for row in rows])


def kernels(rows: list[Row]) -> str:
    cells = [
        (row["active_experts"], f"`{row['kernel']}`", f"{row['seconds'] * 1e3:.3f}", row["launches"])
        for row in rows
    ]
    return table(("k", "kernel", "ms", "launches"), cells)


def parts(rows: list[Row]) -> str:
    return table(("part", "ms"), [(row["part"], f"{row['seconds'] * 1e3:.3g}") for row in rows])


def losses(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        ends = [f"{row[side][at]:.6f}" for at in (0, -1) for side in ("cpu", "card")]
        cells.append((row["active_experts"], len(row["cpu"]), *ends))
    return table(("k", "steps", "first, CPU", "first, card", "last, CPU", "last, card"), cells)


def runs(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        cpu, card = row["cpu"], row["card"]
        what = f"client {cpu['client']}" if cpu["event"] == "client" else "evaluation"
        taken = [f"{side['seconds']:.2f}" if side["seconds"] else "" for side in (cpu, card)]
        both = (f"{cpu['loss']:.4f}", f"{card['loss']:.4f}")
        cells.append((row["run"], cpu["round"], what, cpu["active_experts"], *both, *taken))
    names = ("run", "round", "of", "k", "loss, CPU", "loss, card", "seconds, CPU", "seconds, card")
    return table(names, cells)


def pivot(rows: list[Row], down: tuple[str, ...], across: tuple[str, ...], cell: Callable[[Row], str]) -> str:
    """A table of cells, by the values of some keys down and of others across."""
    cells = {tuple(tuple(row[name] for name in side) for side in (down, across)): cell(row) for row in rows}
    places, columns = (list(dict.fromkeys(at[side] for at in cells)) for side in (0, 1))
    titles = [", ".join(map(shown, across, column)) for column in columns]
    body = [(*place, *(cells.get((place, column), "") for column in columns)) for place in places]
    return table((*("k" if name == "active_experts" else name for name in down), *titles), body)


def shown(name: str, value: object) -> str:
    return {"tokens": f"{value} tokens", "active_experts": f"k = {value}"}.get(name, str(value))


TABLES: tuple[tuple[str, str, str, Callable[[list[Row]], str]], ...] = (
    ("Ceilings", "ceilings", "ceilings", ceilings),
    ("Correctness", "correctness", "checks", checks),
    ("Waits of small steps", "correctness", "waits", waits),
    ("Where small steps wait", "correctness", "waits", waiting_places),
    ("Grouped products alone: ms (share of the large product's rate)", "products", "products", products),
    ("One block: ms (share of the large product's rate), time over ours", "block", "block", block_times),
    ("One block: MB saved for the backward, and at the peak", "block", "block", block_memory),
    ("One block: the first passes of ours and composed, with compilation", "block", "warm_up", warm_up),
    ("Whole steps", "step", "step", steps),
    ("What stays on the card between steps", "step", "model", model),
    ("Where whole steps wait", "step", "step", waiting_places),
    ("What was compiled for whole steps", "step", "compiler", compiler),
    ("The longest kernels of the first of these steps", "step", "kernels", kernels),
    ("Parts of a step", "parts", "parts", parts),
    ("Losses of steps", "losses", "losses", losses),
    ("Losses of runs", "losses", "runs", runs),
)
"""Title, stage, table, and what shows it."""
