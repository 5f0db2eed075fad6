"""What is to be shown on a card, beside what was measured there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from markdown import table

Results = dict[str, dict[str, Any]]
"""What every stage has found, by its name."""
Measured = Callable[[Results], float | None]
"""Reads a value; None where it was not measured."""
SHORT, MIDDLE, LONG = 2048, 8192, 32768


@dataclass(frozen=True)
class Goal:
    what: str
    measured: Measured
    bound: float
    at_least: bool = False
    shown: str = ".2f"
    on_h100: float | None = None
    """The bound there, where it is another."""

    def cells(self, results: Results) -> tuple[str, str, str, str]:
        """What it is, the measured value, the bound, and whether it is met."""
        (device,) = results["device"]["tables"]["device"]
        here = self.on_h100 is not None and "H100" in device.get("gpu", "")
        bound = self.on_h100 if here and self.on_h100 is not None else self.bound
        limit = f"{'>=' if self.at_least else '<='} {bound:{self.shown}}"
        value = self.measured(results)
        if value is None:
            return self.what, "", limit, "not measured"
        met = value >= bound if self.at_least else value <= bound
        return self.what, f"{value:{self.shown}}", limit, "met" if met else "**missed**"


def goals_table(results: Results) -> str:
    return table(("goal", "measured", "bar", ""), [goal.cells(results) for goal in GOALS])


def rows_of(results: Results, stage: str, name: str, **wanted: object) -> list[dict[str, Any]]:
    """The rows of a stage's table with these values."""
    rows: list[dict[str, Any]] = results.get(stage, {}).get("tables", {}).get(name, [])
    return [row for row in rows if wanted.items() <= row.items()]


def step(name: str, tokens: int, k: int, checkpointing: str = "none") -> Measured:
    """Read a value of one whole step."""
    wanted = {
        "tokens": tokens,
        "active_experts": k,
        "gradient_checkpointing": checkpointing,
        "launched": "captured",
    }
    return lambda results: next((row[name] for row in rows_of(results, "step", "step", **wanted)), None)


def block(method: str, tokens: int, k: int) -> Measured:
    """Read the seconds of one method on one block."""
    wanted = {"tokens": tokens, "active_experts": k, "method": method}
    return lambda results: next(
        (row["seconds"] for row in rows_of(results, "block", "block", **wanted)), None
    )


def ratio(above: Measured, below: Measured) -> Measured:
    def divided(results: Results) -> float | None:
        values = above(results), below(results)
        return None if values[0] is None or values[1] is None else values[0] / values[1]

    return divided


def of_ours(method: str, tokens: int, k: int) -> Measured:
    """The time of a method as its library launches it, over that of ours as training launches it."""
    return ratio(block(method, tokens, k), block("ours-captured", tokens, k))


def both_captured(method: str, tokens: int, k: int) -> Measured:
    return ratio(block(f"{method}-captured", tokens, k), block("ours-captured", tokens, k))


def saving(tokens: int) -> Measured:
    return ratio(step("seconds", tokens, 1), step("seconds", tokens, 8))


def waits(results: Results) -> float | None:
    """The most waits of a whole step."""
    rows = [*rows_of(results, "step", "step"), *rows_of(results, "correctness", "waits")]
    return max((sum(row["waits"].values()) for row in rows if "waits" in row), default=None)


def loss_difference(results: Results) -> float | None:
    pairs = [
        (cpu, card)
        for row in rows_of(results, "losses", "losses")
        for cpu, card in zip(row["cpu"], row["card"], strict=True)
    ]
    return max((abs(cpu - card) for cpu, card in pairs), default=None)


def block_goals(measured: Callable[[str, int, int], Measured], how: str) -> list[Goal]:
    """The bars of one block, with times by `measured`."""
    bars = (
        ("PEFT", "peft", SHORT, 8, 3.5),
        ("PEFT", "peft", MIDDLE, 8, 2.2),
        ("PEFT", "peft", MIDDLE, 1, 5.0),
        ("split LoRA under autograd", "composed", MIDDLE, 8, 1.7),
    )
    return [
        Goal(
            f"block, {tokens // 1024}k tokens, k = {k}: {name} / ours, {how}",
            measured(method, tokens, k),
            bar,
            True,
        )
        for name, method, tokens, k, bar in bars
    ]


GOALS = (
    Goal(
        "whole step, 8k tokens, k = 8: share of the large product's rate",
        step("of_ceiling", MIDDLE, 8),
        0.50,
        at_least=True,
        shown=".1%",
        on_h100=0.43,
    ),
    Goal("whole step, 8k tokens: time at k = 1 / at k = 8", saving(MIDDLE), 0.5),
    Goal("whole step, 32k tokens: time at k = 1 / at k = 8", saving(LONG), 0.5),
    *block_goals(of_ours, "ours as a graph"),
    *block_goals(both_captured, "both as graphs"),
    Goal("waits per step, the most of all steps", waits, 0, shown=".0f"),
    Goal(
        "peak beyond model, adapter and moments, 8k tokens, k = 8, `experts` checkpointing, GB",
        ratio(step("peak_bytes", MIDDLE, 8, "experts"), lambda results: 1e9),
        6.0,
    ),
    Goal(
        "losses of 50 steps on the card and on the CPU, float32: largest difference",
        loss_difference,
        1e-3,
        shown=".1e",
    ),
)
