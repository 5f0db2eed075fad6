"""Give every field of plans, jobs, requests, descriptions, answers and updates values of every JSON type.

    python benchmarks/fuzz/fields.py --inputs 200000 --output benchmarks/fuzz/results/fields.json

`decoder.py` changes bytes; here the bytes are right, sealed and of the right lengths, and what they say is of
a wrong type, out of range, missing or unknown. Each input goes where it would go in a run: a request to a
trainer's service (with training replaced by an update that is ready), an answer to the driver of the hub, and
an update to the decoder and the validation. Each must be used or refused in a line that can be printed. Any
exception ends the program with a traceback, and so does an input that makes this process grow.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from decoder import (
    ALLOWED_GROWTH,
    LAYERS,
    MAX_LENGTH,
    body_of,
    peak_bytes,
    require_usable,
    samples,
    seal_like,
)

from fedflame.base.files import model_digest
from fedflame.config.sections import EMBEDDED_MODEL
from fedflame.engines.clients import EngineClients
from fedflame.engines.engine import Engine
from fedflame.engines.hub import HubRounds
from fedflame.engines.jobs import EngineJobs
from fedflame.engines.requests import Request
from fedflame.errors import InvalidMessage
from fedflame.messages import RoundPlan
from fedflame.server.validation import validate_update
from fedflame.trainer.job import TrainingJob
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import load_site
from fedflame.wire.buffer import pack, unpack
from fedflame.wire.codec import decode_update, encode_plan
from fedflame.wire.envelope import LONGEST_BEFORE_BODY, Envelope

Header = dict[str, Any]
RUN = "0123456789abcdef" * 2
KINDS = ("plan", "job", "request", "update", "answer", "description", "event")
PLAIN: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**53 + 1, 2**62, 2**63, -(2**63) - 1, 10**30, 10**400,
    0.0, -0.0, 0.5, 2.0, 1e308, 5e-324, math.nan, math.inf, -math.inf,
    "", "7", "true", "null", "NaN", "learned", "float32", "describe", "train", "update", "refused", "north",
    "\x1b[2J\x07", "\ud800", "\u202e", "a\nb\r", "x" * 5000, "../../etc", RUN,
]  # fmt: skip


def any_value(rng: random.Random, levels: int = 3) -> Any:
    """A JSON value of any type."""
    kind = rng.randrange(10) if levels else 9
    if kind == 0:
        return [any_value(rng, levels - 1) for _ in range(rng.randrange(4))]
    if kind == 1:
        return {str(any_value(rng, 0)): any_value(rng, levels - 1) for _ in range(rng.randrange(4))}
    if kind == 2:
        value: Any = []
        for _ in range(rng.choice([7, 8, 9, 40, 200])):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(PLAIN)


def changed(header: Header, rng: random.Random) -> Header:
    """Up to three fields with other values, missing, or beside unknown ones."""
    said = dict(header)
    for _ in range(rng.randrange(1, 4)):
        name, how = rng.choice(list(header)), rng.randrange(8)
        if how == 0:
            said.pop(name, None)
        elif how == 1:
            said[str(any_value(rng, 0))] = any_value(rng)
        else:
            said[name] = any_value(rng)
    return said


def with_header(message: bytes, rng: random.Random) -> bytes:
    """A sealed message whose header says other things; now and then a tensor has another type or shape."""
    tensors, header = unpack(body_of(message))
    if rng.random() < 0.3:
        name = rng.choice(list(tensors))
        shape = rng.choice([tensors[name].shape, (), (0,), (1, 2, 3), (LAYERS,)])
        dtype = rng.choice([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16])
        tensors[name] = torch.ones(shape).to(dtype)
    try:
        return seal_like(message, pack(tensors, changed(header, rng)))
    except UnicodeEncodeError:  # safetensors writes no lone surrogate; in JSON they are escaped
        return message


class Site:
    """A trainer's service that answers without training."""

    def __init__(self, folder: Path, plan: RoundPlan, update: bytes) -> None:
        (folder / "rows.jsonl").write_text('{"instruction": "say 2", "response": "2"}\n' * 9)
        path = folder / "site.toml"
        path.write_text(
            'name = "north"\n[data]\ndataset_name = "rows.jsonl"\n[trainer]\nactive_experts = 8\n[limits]\n'
            "max_steps = 100\nmax_rounds = 100\nmax_runs = 1000000\n"
        )
        self._said: list[str] = []
        self._service = TrainerService(load_site(path), self._said.append)
        self._service._fine_tune = lambda job, asked, state: update  # type: ignore[method-assign]
        self._ledger, self._plan = folder / "state" / "ledger.jsonl", encode_plan(plan)
        self._job = TrainingJob(
            model_name_or_path=EMBEDDED_MODEL, model_digest=model_digest(EMBEDDED_MODEL), dtype="float32",
            r=plan.adapter.rank, lora_alpha=6.0, use_rslora=False, target_modules="q_proj",
            max_length=MAX_LENGTH,
            template_digest="", assistant_only_loss=True, completion_only_loss="auto", train_on_eos=True,
            num_server_rounds=5,
        ).model_dump()  # fmt: skip

    def verdict(self, kind: str, rng: random.Random) -> str:
        header = {"kind": "train", "ticket": "t", "run": RUN, "site": "north", "addition": False}
        job, plan = self._job, self._plan
        if kind == "plan":
            plan = with_header(plan, rng)
        elif kind == "job":
            job = changed(job, rng)
        else:
            header = changed(header, rng)
        self._said.clear()
        self._ledger.unlink(missing_ok=True)  # else every input reads what all others have written
        try:
            request = Envelope.from_bytes(Envelope({"job": job} | header, plan).to_bytes())
        except InvalidMessage as refusal:
            return printable(str(refusal))
        answer = Envelope.from_bytes(self._service.answer(request).to_bytes())
        for line in self._said:
            printable(line)
        assert answer.header["kind"] in ("update", "description", "refused", "failed", "lacking")
        # A plan of other shapes than the update that is ready fails when that is read again.
        return printable(answer.header["reason"]) if "reason" in answer.header else "used"


class Hub:
    """The driver of a hub with two sites, of which one answers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._said = folder, list[str]()

    def verdict(self, kind: str, rng: random.Random) -> str:
        self._said.clear()
        jobs = SimpleNamespace(current=SimpleNamespace(sites={"north"}))
        clients = EngineClients(
            cast(Engine, None), cast(EngineJobs, jobs), RUN, {}, ["north", "south"], HubRounds(), 1,
            self._folder, self._said.append,
        )  # fmt: skip
        asks = "describe" if kind == "description" else "train"
        requests = [
            Request(site, asks, self._folder / site, LONGEST_BEFORE_BODY, addition=rng.random() < 0.3)
            for site in clients.sites
        ]
        answer: Header = {"ticket": requests[0].ticket, "run": RUN, "site": "north", "reason": "not now"}
        about = {"num_examples": 7, "active_experts": 2, "max_active_experts": 2, "held": ""}
        told = {"kind": rng.choice(["update", "refused", "failed", "lacking"]), "steps": 2, "tokens": 10}
        answer |= {"kind": "description", **about} if kind == "description" else told
        event: Header = {"kind": "answered", "ticket": requests[0].ticket, "site": "north"}
        if kind == "event":
            event = changed(event | {"sites": ["north"], "reason": "gone"}, rng)
        else:
            answer = changed(answer, rng)
        try:
            received = Envelope.from_bytes(Envelope(event, Envelope(answer, b"body").to_bytes()).to_bytes())
        except InvalidMessage as refusal:
            return printable(str(refusal))
        clients._take(received, requests)
        for line in self._said:
            printable(line)
        assert not requests[1].settled or requests[1].ticket == received.header.get("ticket")
        assert all(type(rows) is int and 0 <= rows < 2**63 for rows in clients.num_examples())
        return printable(requests[0].failure) if requests[0].failure else "used"


def update_verdict(plan: RoundPlan, message: bytes, rng: random.Random) -> str:
    try:
        update = decode_update(with_header(message, rng), plan)
        validate_update(update, plan, MAX_LENGTH)
        require_usable(update, plan)
    except InvalidMessage as refusal:
        return printable(str(refusal))
    return "used"


def printable(line: str) -> str:
    assert line.isprintable() and len(line) < 1200, ascii(line)
    return line


def by_kind(inputs: int, seed: int, folder: Path) -> dict[str, Any]:
    plans, sent = samples()
    plan = replace(plans["float32"], round=3)
    (folder / "site").mkdir()
    site, hub = Site(folder / "site", plan, sent["float32"]), Hub(folder)
    ways = dict.fromkeys(("plan", "job", "request"), site.verdict)
    ways |= dict.fromkeys(("answer", "description", "event"), hub.verdict)
    ways["update"] = lambda kind, rng: update_verdict(plan, sent["float32"], rng)
    rng, results = random.Random(seed), {kind: Counter[str]() for kind in KINDS}
    reasons, start, before = Counter[str](), time.monotonic(), 0
    for number in range(inputs):
        kind = rng.choice(KINDS)
        verdict = ways[kind](kind, rng)
        results[kind]["used" if verdict == "used" else "refused"] += 1
        reasons[" ".join(verdict.split()[:4])] += 1
        if number == 2000:
            before = peak_bytes()
    growth = peak_bytes() - before if before else 0
    assert growth < ALLOWED_GROWTH, f"{growth} bytes more than after 2000 inputs"
    return {
        "inputs": inputs, "seed": seed, "seconds": round(time.monotonic() - start, 1),
        "unhandled_exceptions": 0, "growth_of_peak_memory_bytes": growth,
        "by_kind": {name: dict(counts) for name, counts in results.items()},
        "different_reasons": len(reasons), "commonest_reasons": dict(reasons.most_common(12)),
        "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedflame-fields-") as folder:
        text = json.dumps(by_kind(given.inputs, given.seed, Path(folder)), indent=1) + "\n"
    if given.output:
        given.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
