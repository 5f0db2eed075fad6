"""Encode a plan as its difference to a plan that the client already holds.

If the shape of a value is unchanged, only its changed rows are sent (in a bank, a row is an expert). Merged
factors only grow, so only their new ranks are sent. The client rebuilds the plan byte for byte and verifies
its digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedflame.errors import InvalidMessage
from fedflame.messages import MERGED_PREFIX, NOTHING, Adapter
from fedflame.wire.buffer import pack, unpack, views
from fedflame.wire.envelope import Bytes
from fedflame.wire.frame import opened, seal, seal_digest, unseal

_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
"""The exceptions that mismatched parts can raise."""
_ROWS = "@rows"
"""Suffix of a name: the indices of the rows, if only some rows of the value are sent."""


def plan_digest(plan: Bytes) -> str:
    """Return the digest by which hub and client identify an encoded plan; empty for no bytes."""
    return seal_digest(plan)


def encode_addition(plan: Bytes, held: Bytes) -> bytes | None:
    """Encode `plan` for a client that holds `held`, as one sealed buffer; None if all values are new.

    Both plans must come from `encode_plan` in this process: they are not checked again.
    """
    wanted, header = views(opened(plan))
    there, _ = views(opened(held))
    parts: dict[str, Tensor] = {}
    for name, value in _own(wanted).items():
        parts |= _changed(name, value, there.get(name))
    merged, before = Adapter.from_tensors(wanted, MERGED_PREFIX), Adapter.from_tensors(there, MERGED_PREFIX)
    kept = before.rank if _begins_with(merged, before) else 0
    parts |= _without_ranks(merged, kept).tensors(MERGED_PREFIX)
    if _values(parts) == _values(wanted):
        return None
    about = {"kind": "addition", "held": plan_digest(held), "plan": plan_digest(plan)}
    return seal(pack(parts, about | {"kept_merged_rank": kept, "header": header}))


def decode_addition(message: Bytes, held: bytes) -> bytes:
    """Return the encoded plan, byte for byte as the server has it.

    Raises:
        InvalidMessage: the addition is damaged, belongs to another plan than `held`, or gives another plan
            than the server sent.
    """
    try:
        parts, about = unpack(unseal(message))
        if about.get("kind") != "addition" or about.get("held") != plan_digest(held):
            raise InvalidMessage("not an addition to the plan that is held")
        plan = _put_together(parts, about, unpack(unseal(held))[0])
    except _DAMAGE as error:
        raise InvalidMessage(f"not a fedflame addition: {type(error).__name__}: {error}") from error
    if plan_digest(plan) != about.get("plan"):
        raise InvalidMessage("the held plan and its addition do not give the plan that was sent")
    return plan


def _put_together(parts: Mapping[str, Tensor], about: Mapping[str, Any], held: Mapping[str, Tensor]) -> bytes:
    own, there = _own(parts), _own(held)
    names = {name.removesuffix(_ROWS) for name in own} | there.keys()
    tensors = {name: _with_changes(name, own, there) for name in names}
    kept = Adapter.from_tensors(held, MERGED_PREFIX) if about["kept_merged_rank"] else NOTHING
    merged = kept.concatenate(Adapter.from_tensors(parts, MERGED_PREFIX))
    return seal(pack(tensors | merged.tensors(MERGED_PREFIX), about["header"]))


def _values(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for name, value in tensors.items() if not name.endswith(_ROWS))


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors except the merged factors."""
    return {name: value for name, value in tensors.items() if not name.startswith(MERGED_PREFIX)}


def _changed(name: str, value: Tensor, before: Tensor | None) -> dict[str, Tensor]:
    if before is None or before.shape != value.shape:
        return {name: value}
    pairs = zip(_bits(value), _bits(before), strict=True)
    rows = torch.tensor([row for row, pair in enumerate(pairs) if not torch.equal(*pair)], dtype=torch.int64)
    if len(rows) == len(value):
        return {name: value}
    return {name: value[rows], name + _ROWS: rows} if len(rows) else {}


def _with_changes(name: str, own: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> Tensor:
    rows = own.get(name + _ROWS)
    if rows is not None:
        return held[name].index_copy(0, rows, own[name])
    return own[name] if name in own else held[name]


def _begins_with(merged: Adapter, before: Adapter) -> bool:
    """Return whether the first ranks of `merged` equal `before` bit for bit."""
    if merged.rank < before.rank or merged.tensors().keys() != before.tensors().keys():
        return False
    first = merged.with_rank(before.rank).tensors()
    return all(torch.equal(_bits(first[name]), _bits(value)) for name, value in before.tensors().items())


def _without_ranks(merged: Adapter, kept: int) -> Adapter:
    """Return the ranks after the first `kept`."""
    if kept == merged.rank:
        return NOTHING
    return Adapter.from_factors(
        {name: (b[..., kept:], a[..., kept:, :]) for name, (b, a) in merged.factors().items()}
    )


def _bits(value: Tensor) -> Tensor:
    """View fp32 as int32: comparing floats would take 0.0 and -0.0 for equal."""
    return value.contiguous().view(torch.int32)
