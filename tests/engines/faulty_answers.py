"""Answers of sites that fail, or say what they must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.altered_answers import Which
from tests.engines_here import Deliver
from torch import Tensor

from fedflame.wire.buffer import pack, unpack
from fedflame.wire.envelope import Envelope
from fedflame.wire.frame import seal, unseal
from fedflame.wire.planes import compress, decompress


def asked_for(request: bytes) -> Which | None:
    """What a request is about; None if it is no plan."""
    envelope = Envelope.from_bytes(request)
    if envelope.header["kind"] != "train":
        return None
    _, header = unpack(unseal(bytes(envelope.body)))
    plan = header.get("header", header)  # of an addition, that of the plan that it makes
    return plan["round"], plan["client"]


def reply(request: bytes, body: bytes, **changes: str) -> bytes:
    """An answer to just this request, whatever its body is."""
    asked = Envelope.from_bytes(request).header
    header = {name: asked[name] for name in ("ticket", "run", "site")}
    return Envelope(header | {"kind": "update", "steps": 1, "tokens": 1} | changes, body).to_bytes()


def flipped(content: bytes) -> bytes:
    """With one bit changed."""
    return content[:-1] + bytes([content[-1] ^ 1])


KINDS = {
    "fails": "RuntimeError: out of memory",
    "garbage": "its answer is refused: 7 bytes that are no envelope",
    "damaged": "its checksum is wrong",
    "repeats": "its answer is refused: its ticket is not the one that was asked for",
    "gone": "not connected",
}


def failing_as(kinds: dict[Which, str], deliver: Deliver) -> Deliver:
    """Sites that answer as the kind of failure says, and honestly in all other rounds."""
    last: dict[str, bytes] = {}

    def answer(site: str, request: bytes) -> bytes:
        kind = kinds.get(asked_for(request) or (0, 0))
        if kind == "garbage":
            return b"garbage"
        if kind == "repeats":
            return last[site]
        if kind == "fails":
            return reply(request, b"", kind="failed", reason=KINDS["fails"])
        last[site] = deliver(site, request)
        return flipped(last[site]) if kind == "damaged" else last[site]

    return answer


def altered(update: bytes, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> bytes:
    """The sealed update with other values or fields, under a seal that is right."""
    tensors, header = unpack(decompress(unseal(update), 1 << 30))
    change(tensors, header)
    return seal(compress(pack(tensors, header)))


def of_client_0(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["client"] = 0


def not_finite(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["experts.0.B2"].fill_(float("nan"))


def more_counts_than_tokens(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["counts"] += 10**6


def more_rows(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["num_examples"] = 10**6


def tokens_of_62_bits(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["tokens"] = 2**62


def tokens_as_text(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["tokens"] = str(header["tokens"])


def rows_as_truth(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["num_examples"] = True


def fewer_counts(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["counts"][tensors["counts"] > 1] -= 1


def escape_codes(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["\x1b[2J\ud800\nred"] = 0


Forge = Callable[[bytes, dict[Which, bytes]], bytes]
"""From an honest update, and all that sites have said so far, to another one."""
LIES: dict[Which, tuple[Forge, str]] = {
    (3, 1): (lambda update, said: said[1, 1], "update is for round 1; 3 was asked for"),
    (4, 1): (
        lambda update, said: altered(update, of_client_0),
        "update is for client 0; 1 was asked for",
    ),
    (5, 1): (lambda update, said: flipped(update), "its checksum is wrong"),
    (6, 1): (lambda update, said: update + bytes(2 << 20), "an answer has at most"),
    (7, 1): (lambda update, said: altered(update, not_finite), "that is not finite"),
    (8, 1): (lambda update, said: altered(update, more_counts_than_tokens), "counts must lie between 0"),
    (9, 1): (lambda update, said: altered(update, more_rows), "update claims 1000000 rows; the client has"),
    (10, 1): (lambda update, said: said[1, -1], "not a fedflame update"),
    (11, 1): (lambda update, said: altered(update, tokens_of_62_bits), "1 steps of this plan have 1 to"),
    (12, 1): (lambda update, said: altered(update, tokens_as_text), "tokens is of type str"),
    (13, 1): (lambda update, said: altered(update, rows_as_truth), "num_examples is of type bool"),
    (14, 1): (lambda update, said: altered(update, fewer_counts), "each must sum to tokens x k"),
    (15, 1): (lambda update, said: altered(update, escape_codes), "or said twice: [2J red"),
    (16, 1): (lambda update, said: update + bytes(4 << 20), "an answer to this request has at most"),
}


def lying(sites: Deliver, said: dict[Which, bytes]) -> Deliver:
    """Sites whose answers are right but for the updates in `LIES`."""

    def answer(site: str, request: bytes) -> bytes:
        honest, which = sites(site, request), asked_for(request)
        if which is None:
            return honest
        update = said[which] = bytes(Envelope.from_bytes(honest).body)
        said[which[0], -1] = bytes(Envelope.from_bytes(request).body)
        return reply(request, LIES[which][0](update, said)) if which in LIES else honest

    return answer


def claiming(rows: int, sites: Deliver, liar: str) -> Deliver:
    """Sites of which one says, in its description and in every update, that it holds so many rows."""

    def more(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["num_examples"] = rows

    def answer(site: str, request: bytes) -> bytes:
        honest = Envelope.from_bytes(sites(site, request))
        if site != liar:
            return honest.to_bytes()
        if asked_for(request) is None:
            return Envelope(honest.header | {"num_examples": rows}).to_bytes()
        return reply(request, altered(bytes(honest.body), more))

    return answer
