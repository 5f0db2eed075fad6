"""A small run whose every number can be worked out by hand, and the parts of its report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fedflame.checked_json import write_checked
from fedflame.config.run_config import RunConfig
from fedflame.report import write_report
from fedflame.run_files.lines import last_checksum, line_of

TIERS = [8, 4, 2, 1]
LAYERS, EXPERTS, ROUNDS = 2, 3, 3
CATEGORIES = ["arithmetic", "<script>alert(1)</script>"]


def evaluation(at: int, k: int, category: str | None, loss: float, score: float | None) -> dict[str, Any]:
    return {
        "event": "evaluation",
        "round": at,
        "active_experts": k,
        "category": category,
        "loss": loss,
        "exact_match": score,
        "rouge_l": None,
        "rows": 40,
        "response_tokens": 400,
    }


def client_round(at: int, client: int) -> dict[str, Any]:
    tokens = 1000 * at
    counts = [[0] * EXPERTS for _ in range(LAYERS)]
    counts[1][2] = 250 * at * at
    counts[0][0] = tokens
    return {
        "event": "client",
        "round": at,
        "client": client,
        "active_experts": TIERS[client],
        "loss": 2.0,
        "tokens": tokens,
        "steps": 5,
        "num_examples": 30,
        "trained_examples": 20,
        "seconds": 2.0 * at,
        "training_flops": 1.5e9,
        "bytes_up": 1_050_000,
        "bytes_down": 2_000_000,
        "rescaler": [1.0, 1.0 + 0.1 * at * client],
        "counts": counts,
        "norms": {"A1": 1.0 * at, "B1": 2.0, "A2": 3.0, "B2": 4.0, "attention": 0.5, "rescaler": 0.25 / at},
        "pace": 1.0 + 0.1 * at + client,
    }


def synthetic_events() -> list[dict[str, Any]]:
    """Three rounds of four clients; client 2 (k = 2) is excluded from round 2."""
    events: list[dict[str, Any]] = []
    for at in range(ROUNDS + 1):
        if at:
            events += [client_round(at, client) for client in range(4) if (at, client) != (2, 2)]
        if at == 2:
            reason = "update has a <NaN> in 0.A1"
            events.append(
                {"event": "excluded", "round": 2, "client": 2, "active_experts": 2, "reason": reason}
            )
        for i, k in enumerate(TIERS):
            events.append(evaluation(at, k, None, 3.25 + i - 0.5 * at, 0.05 + 0.2 * at - 0.01 * i))
            events += [evaluation(at, k, name, 3.0 - 0.5 * at, 0.1 * at) for name in CATEGORIES]
        if at == 3:
            events.append({"event": "clipped", "round": 3, "client": 1, "share": 0.5})
            events.append({"event": "outlier", "round": 3, "client": 1, "times": 3.25, "limit": 3.0})
        if at:
            events.append({"event": "round", "round": at, "clients": 3 + (at != 2), "seconds": 30.0})
    return events


def write_run(folder: Path, events: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    per_category = {CATEGORIES[0]: 10, CATEGORIES[1]: 20}
    clients = [
        {"client": i, "active_experts": k, "rows": 30, "per_category": per_category}
        for i, k in enumerate(TIERS)
    ]
    partition = {"partition": "dirichlet", "alpha": 0.5, "rows": 120, "categories": CATEGORIES}
    partition |= {"clients": clients, "held_out_rows": 40, "truncated_rows": 0, "skipped_rows": 0}
    tiers = [
        {"active_experts": k, "forward_flops_per_token": 1e9 + 0.5e9 * k, "training_flops_per_token": 3e9}
        for k in TIERS
    ]
    plan = {"clients": [], "tiers": tiers, "adapter_parameters": 523_000, "adapter_bytes": 2_092_000}
    files = {
        "config.json": RunConfig().model_dump(),
        "environment.json": {"python": "3.11", "fedflame": "0.1.0", "platform": "a<b"},
        "partition.json": partition,
        "plan.json": plan,
    }
    for name, value in files.items():
        write_checked(folder / name, value)
    (folder / "metrics.jsonl").touch()
    append(folder, *events)
    return folder


def append(run: Path, *events: dict[str, Any]) -> None:
    """Add lines as a run that goes on adds them."""
    path = run / "metrics.jsonl"
    before = last_checksum(path, path.stat().st_size)
    for event in events:
        line, before = line_of(event, before)
        with path.open("ab") as file:
            file.write(line)


def report(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def part(html: str, title: str) -> str:
    """The section of the page under a heading."""
    found = re.search(rf"<section><h2>{title}</h2>(.*?)</section>", html, re.S)
    assert found, f"no section {title!r}"
    return found[1]


def rows(html: str) -> list[list[str]]:
    """The text of each table row, cell by cell; spans run together, titles dropped."""
    html = re.sub(r"<title>.*?</title>", "", html)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells]
