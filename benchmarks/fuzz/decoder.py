"""Feed the decoder with damaged, forged and foreign messages, and hold it to its promise.

    python benchmarks/fuzz/decoder.py --inputs 200000 --output benchmarks/fuzz/results/decoder.json
    python benchmarks/fuzz/decoder.py --coverage-guided --inputs 200000  # after: pip install atheris

Every input either raises `InvalidMessage` or is an answer that aggregation may use. Whatever was changed
without a new seal must be refused. Any other exception ends the program with a traceback, and so does an
input that makes this process grow. The inputs are mutations of real messages, most of them sealed again, so
that they reach what is behind the checksum; with `--coverage-guided`, atheris (libFuzzer) chooses them by the
code that they reach.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from fedflame import messages
from fedflame.config.words import UpdateDtype
from fedflame.errors import InvalidMessage
from fedflame.messages import Adapter, ClientUpdate, RoundPlan
from fedflame.server.validation import validate_update
from fedflame.wire import buffer, codec, frame, planes, values
from fedflame.wire.codec import decode_plan, decode_update, encode_plan, encode_update
from fedflame.wire.frame import seal, unseal
from fedflame.wire.planes import compress, decompress

LAYERS, EXPERTS, RANK, HIDDEN, WIDTH = 2, 5, 3, 7, 4
MAX_LENGTH = 20
"""Tokens of the longest row."""
ALLOWED_GROWTH = 256 << 20
"""Bytes of peak memory above that of the first inputs; no message here is longer than a few thousand."""
MUTATIONS = ("damaged", "body", "header", "number", "truncated", "spliced", "compressed", "garbage")


def samples() -> tuple[dict[str, RoundPlan], dict[str, bytes]]:
    """A plan for each dtype, and the messages that are mutated."""
    generator = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        shapes = {
            "A1": (2 * RANK, HIDDEN),
            "B1": (2 * WIDTH, RANK),
            "A2": (RANK, WIDTH),
            "B2": (HIDDEN, RANK),
        }
        banks = {
            f"{layer}.{name}": torch.randn(EXPERTS, *shape, generator=generator)
            for layer in range(LAYERS)
            for name, shape in shapes.items()
        }
        query = {
            "q.A": torch.randn(RANK, 6, generator=generator),
            "q.B": torch.randn(9, RANK, generator=generator),
        }
        return Adapter(banks, query)

    plan = RoundPlan(
        round=3, client=1, seed=2, active_experts=2, rescaler="learned", rescaler_values=torch.ones(LAYERS),
        adapter=adapter(), learning_rate=0.1, weight_decay=0.0, batch_size=4, max_steps=9,
    )  # fmt: skip
    counts = torch.tensor([[7, 0, 11, 0, 4], [0, 0, 11, 11, 0]])
    update = ClientUpdate(
        round=3, client=1, active_experts=2, delta=adapter(), rescaler_values=torch.ones(LAYERS),
        counts=counts, tokens=11, num_examples=4, trained_examples=3, steps=9, loss=1.5,
    )  # fmt: skip
    plans = {dtype: replace(plan, update_dtype=dtype) for dtype in get_args(UpdateDtype)}
    sent = {dtype: encode_update(update, asked) for dtype, asked in plans.items()}
    return plans, sent | {"plan": encode_plan(plan)}


def accepted(kind: str, message: bytes, plans: dict[str, RoundPlan]) -> str:
    """`used`, or why the message is refused."""
    try:
        if kind == "plan":
            assert encode_plan(decode_plan(message))
        else:
            update = decode_update(message, plans[kind])
            validate_update(update, plans[kind], MAX_LENGTH)
            require_usable(update, plans[kind])
    except InvalidMessage as refusal:
        return str(refusal)
    return "used"


def require_usable(update: ClientUpdate, plan: RoundPlan) -> None:
    """What aggregation relies on, checked once more by other means than the decoder's."""
    assert (update.round, update.client, update.active_experts) == (
        plan.round,
        plan.client,
        plan.active_experts,
    )
    assert {n: v.shape for n, v in update.delta.tensors().items()} == {
        n: v.shape for n, v in plan.adapter.tensors().items()
    }
    assert all(bool(torch.isfinite(value).all()) for value in update.delta.tensors().values())
    assert all(0 <= count <= update.tokens for row in update.counts.tolist() for count in row)
    assert all(sum(row) == update.tokens * plan.active_experts for row in update.counts.tolist())
    assert update.num_examples >= 1 and 1 <= update.steps <= plan.max_steps


def mutate(message: bytes, mutation: str, rng: random.Random, others: list[bytes]) -> bytes:
    """Another message, sealed anew unless it is `damaged` or `garbage`; `compressed` changes what is under
    the seal, the others the safetensors buffer of a plan or, below its compression, of an update.
    """
    if mutation == "garbage":
        return rng.randbytes(rng.randrange(400))
    if mutation == "damaged":
        changed = bytearray(message)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if mutation == "compressed":
        return seal(changed_bytes(unseal(message), 0, len(unseal(message)), rng))
    body, sealed = body_of(message), partial(seal_like, message)
    header = 8 + int.from_bytes(body[:8], "little")
    if mutation == "truncated":
        return sealed(body[: rng.randrange(len(body))])
    if mutation == "spliced":
        other = body_of(rng.choice(others))
        return sealed(body[: rng.randrange(len(body))] + other[rng.randrange(len(other)) :])
    if mutation == "number":
        return sealed(_with_another_number(body, header, rng))
    end = header if mutation == "header" else len(body)
    return sealed(changed_bytes(body, 8 if mutation == "header" else 0, end, rng))


def changed_bytes(body: bytes, begin: int, end: int, rng: random.Random) -> bytes:
    """Up to four times, up to three bytes between `begin` and `end` as up to three others."""
    changed = bytearray(body)
    for _ in range(rng.randrange(1, 5)):
        start = rng.randrange(begin, end)
        changed[start : start + rng.randrange(4)] = rng.randbytes(rng.randrange(4))
    return bytes(changed)


def body_of(message: bytes) -> bytes:
    """The safetensors buffer."""
    body = unseal(message)
    return bytes(body) if is_plan(message) else decompress(body, 1 << 20)


def seal_like(message: bytes, body: bytes) -> bytes:
    return seal(body if is_plan(message) else compress(body))


def is_plan(message: bytes) -> bool:
    return unseal(message)[8:9] == b"{"


def _with_another_number(body: bytes, header: int, rng: random.Random) -> bytes:
    """One scalar, shape or offset of the JSON replaced, and its length put right."""
    text = body[8:header].decode()
    place = rng.choice([index for index, letter in enumerate(text) if letter.isdigit()])
    number = rng.choice(["0", "-1", "1e3", "18446744073709551616", "NaN", "null", "[]", '"1"', "9" * 30, "2"])
    changed = (text[:place] + number + text[place + 1 :]).encode()
    return len(changed).to_bytes(8, "little") + changed + body[header:]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def by_mutation(inputs: int, seed: int) -> dict[str, Any]:
    plans, sent = samples()
    rng, results = random.Random(seed), {mutation: Counter[str]() for mutation in MUTATIONS}
    reasons, others = Counter[str](), list(sent.values())
    start, before = time.monotonic(), 0
    for number in range(inputs):
        mutation, kind = rng.choice(MUTATIONS), rng.choice(list(sent))
        message = mutate(sent[kind], mutation, rng, others)
        verdict = accepted(kind, message, plans)
        changed_without_seal = mutation in ("damaged", "garbage") and message != sent[kind]
        assert not (changed_without_seal and verdict == "used"), message.hex()
        results[mutation]["used" if verdict == "used" else "refused"] += 1
        reasons[" ".join(verdict.split()[:4])] += 1
        if number == 1000:
            before = peak_bytes()
    growth = peak_bytes() - before
    assert growth < ALLOWED_GROWTH, f"{growth} bytes more than after 1000 inputs"
    return {
        "inputs": inputs, "seed": seed, "seconds": round(time.monotonic() - start, 1),
        "unhandled_exceptions": 0, "growth_of_peak_memory_bytes": growth,
        "by_mutation": {name: dict(counts) for name, counts in results.items()},
        "different_reasons": len(reasons), "commonest_reasons": dict(reasons.most_common(12)),
        "python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def coverage_guided(inputs: int) -> None:
    """libFuzzer's bytes: the first chooses the message, the rest is its body; it prints its own summary."""
    import atheris

    plans, sent = samples()
    kinds = list(sent)

    def check(data: bytes) -> None:
        if data:
            accepted(kinds[data[0] % len(kinds)], seal(data[1:]), plans)

    corpus = Path(tempfile.mkdtemp(prefix="fedflame-corpus-"))
    for index, kind in enumerate(kinds):
        (corpus / kind).write_bytes(bytes([index]) + unseal(sent[kind]))
    for module in (buffer, codec, frame, planes, values, messages):
        for function in filter(inspect.isfunction, vars(module).values()):
            atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], f"-runs={inputs}", "-max_len=8192", str(corpus)], check)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--coverage-guided", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.coverage_guided:
        coverage_guided(given.inputs)
        return
    text = json.dumps(by_mutation(given.inputs, given.seed), indent=1) + "\n"
    if given.output:
        given.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
