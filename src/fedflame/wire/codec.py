"""Encode plans, updates and evaluations as bytes, and decode them.

An update contains only the experts that the client activated, and only the half that it trained. This is
lossless: the rest did not change, so its delta is zero. Updates are compressed without loss (`planes`). Plans
are not, because they are compared with the plans that clients hold (`addition`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import fields, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fedflame.config.words import UpdateDtype
from fedflame.errors import InvalidMessage
from fedflame.messages import (
    MERGED_PREFIX,
    Adapter,
    ClientEvaluation,
    ClientUpdate,
    EvaluationPlan,
    RoundPlan,
    is_trained,
    rank_dim,
)
from fedflame.wire.buffer import pack, unpack, views
from fedflame.wire.envelope import Bytes
from fedflame.wire.frame import opened, seal, unseal
from fedflame.wire.packed_header import read_packed_header
from fedflame.wire.plan_ranges import require_possible
from fedflame.wire.planes import compress, decompress
from fedflame.wire.values import layout, restored, rounded

_Message = RoundPlan | ClientUpdate | EvaluationPlan | ClientEvaluation
_TYPES: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (float, int),
    float | None: (float, int, NoneType),
    int | None: (int, NoneType),
    bool: (bool,),
    Tensor: (Tensor,),
}
"""The type of a field -> the types that its value may have; True is no 1."""
_KINDS: dict[type[_Message], str] = {
    RoundPlan: "plan",
    ClientUpdate: "update",
    EvaluationPlan: "evaluation plan",
    ClientEvaluation: "evaluation",
}
_NAMES_AND_SCALARS = 1 << 20
"""Bytes allowed beyond the values of an update: the names and shapes of thousands of tensors."""


EVALUATION_LIMIT = 1 << 16
"""Bytes of an evaluation: a few numbers under their names."""


def encode_plan(plan: RoundPlan | EvaluationPlan) -> bytes:
    """Encode a plan as one sealed buffer with everything that the client needs."""
    tensors = plan.adapter.tensors() | plan.merged.tensors(MERGED_PREFIX)
    return seal(_packed(_KINDS[type(plan)], plan, tensors | {"rescaler_values": plan.rescaler_values}))


def decode_plan(message: bytes) -> RoundPlan:
    """Decode a plan, bit for bit. Raises InvalidMessage if it is damaged, no plan, or asks the impossible."""
    plan: RoundPlan = _decoded_plan(RoundPlan, message)
    return plan


def decode_evaluation_plan(message: bytes) -> EvaluationPlan:
    """Decode a plan of an evaluation, as `decode_plan` does."""
    plan: EvaluationPlan = _decoded_plan(EvaluationPlan, message)
    return plan


def asks_for_scores(plan: Bytes) -> bool:
    """Return whether this is a plan of an evaluation, as far as its header says; it is not checked."""
    try:
        return bool(read_packed_header(opened(plan)).get("kind") == _KINDS[EvaluationPlan])
    except ValueError:
        return False


def _decoded_plan(cls: type[Any], message: bytes) -> Any:
    tensors, header = _unpack(_KINDS[cls], unseal(message))
    adapter, merged = Adapter.from_tensors(tensors), Adapter.from_tensors(tensors, MERGED_PREFIX)
    known = {*adapter.tensors(), *merged.tensors(MERGED_PREFIX), "rescaler_values"}
    _require_names(tensors.keys(), known)
    plan = _build(cls, header, tensors, adapter=adapter, merged=merged)
    require_possible(plan)
    return plan


def encode_evaluation(evaluation: ClientEvaluation) -> bytes:
    """Encode the answer to a plan of an evaluation as one sealed buffer without tensors."""
    return seal(_packed(_KINDS[ClientEvaluation], evaluation, {}))


def decode_evaluation(message: Bytes) -> ClientEvaluation:
    """Decode an evaluation; `server.validation` checks its numbers.

    Raises:
        InvalidMessage: the message is longer than any evaluation, is damaged, or has wrong fields or types.
    """
    if len(message) > EVALUATION_LIMIT:
        raise InvalidMessage(f"evaluation of {len(message):,} bytes; it has at most {EVALUATION_LIMIT:,}")
    tensors, header = _unpack(_KINDS[ClientEvaluation], unseal(message))
    _require_names(tensors.keys(), ())
    evaluation: ClientEvaluation = _build(ClientEvaluation, header, {})
    return evaluation


def encode_update(update: ClientUpdate, plan: RoundPlan) -> bytes:
    """Encode an update in the plan's `update_dtype`: only the trained half of the activated experts."""
    attention = {
        name: delta if is_trained(name, update.trainable) else delta.narrow(rank_dim(name), 0, 0)
        for name, delta in update.delta.attention.items()
    }
    experts = {name: delta[_moved_experts(name, update)] for name, delta in update.delta.experts.items()}
    values = rounded(Adapter(experts, attention).tensors(), plan.update_dtype)
    tensors = values | {"rescaler_values": update.rescaler_values, "counts": update.counts}
    return seal(compress(_packed(_KINDS[ClientUpdate], update, tensors)))


def decode_update(message: Bytes, plan: RoundPlan) -> ClientUpdate:
    """Decode an update; parts that were not sent are zero. `server.validation` checks the values.

    Raises:
        InvalidMessage: the message is larger than any answer to this plan, is damaged, or has wrong fields,
            names, shapes or dtypes.
    """
    limit = update_limit(plan)
    if len(message) > limit:
        raise InvalidMessage(f"update of {len(message):,} bytes; an answer has at most {limit:,}")
    try:
        body = decompress(unseal(message), limit)
    except ValueError as error:
        raise InvalidMessage(f"not a fedflame update: {error}") from error
    tensors, header = _unpack(_KINDS[ClientUpdate], body)
    counts = tensors.get("counts", torch.empty(0))
    _require("counts", counts, _counts_shape(plan), torch.int64)
    packed: ClientUpdate = _build(ClientUpdate, header, tensors, delta=Adapter({}, {}))
    expected = layout(_packed_shapes(packed, plan), plan.update_dtype)
    values = {name: value for name, value in tensors.items() if name not in ("rescaler_values", "counts")}
    _require_names(values.keys(), expected.keys())
    for name, (shape, dtype) in expected.items():
        _require(name, values[name], shape, dtype)
    travelled = Adapter.from_tensors(restored(values, plan.update_dtype))
    return replace(packed, delta=_unpacked(travelled, packed, plan))


def update_limit(plan: RoundPlan) -> int:
    """Return the largest size in bytes that an answer to this plan can have."""
    return _update_limit(plan.adapter, _counts_shape(plan), plan.update_dtype)


def encoded_update_limit(plan: Bytes) -> int:
    """Return `update_limit` of a plan that this process has encoded; its values are not copied."""
    tensors, header = views(opened(plan))
    adapter = Adapter.from_tensors(tensors)
    experts = next(iter(adapter.experts.values())).shape[0]
    return _update_limit(adapter, (len(tensors["rescaler_values"]), experts), header["update_dtype"])


def encoded_plan_work(plan: Bytes) -> float:
    """Return batches times experts per token of a plan that this process has encoded.

    Of an evaluation, the passes over the rows count: one, and one for each token of an answer.
    """
    header = read_packed_header(opened(plan))
    if header["kind"] == _KINDS[EvaluationPlan]:
        return float((1 + header["max_new_tokens"]) * header["active_experts"])
    return float(header["max_steps"] * header["gradient_accumulation_steps"] * header["active_experts"])


def _update_limit(adapter: Adapter, counts: tuple[int, int], dtype: UpdateDtype) -> int:
    shapes = {name: tuple(value.shape) for name, value in adapter.tensors().items()}
    values = sum(math.prod(shape) * kind.itemsize for shape, kind in layout(shapes, dtype).values())
    return values + 4 * counts[0] + 8 * math.prod(counts) + _NAMES_AND_SCALARS


def _counts_shape(plan: RoundPlan) -> tuple[int, int]:
    return len(plan.rescaler_values), next(iter(plan.adapter.experts.values())).shape[0]


def _moved_experts(bank: str, update: ClientUpdate) -> Tensor:
    """Return the indices of the experts whose slice of this bank is sent."""
    activated = update.counts[int(bank.split(".")[0])] > 0
    return torch.nonzero(activated & is_trained(bank, update.trainable)).squeeze(1)


def _packed_shapes(update: ClientUpdate, plan: RoundPlan) -> dict[str, tuple[int, ...]]:
    """What the values of an answer with these counts look like on the way."""
    experts = {
        name: value.new_empty((len(_moved_experts(name, update)), *value.shape[1:]), device="meta")
        for name, value in plan.adapter.experts.items()
    }
    attention = {
        name: value if is_trained(name, update.trainable) else value.narrow(rank_dim(name), 0, 0)
        for name, value in plan.adapter.attention.items()
    }
    return {name: tuple(value.shape) for name, value in Adapter(experts, attention).tensors().items()}


def _unpacked(travelled: Adapter, update: ClientUpdate, plan: RoundPlan) -> Adapter:
    """Return the delta in the plan's shapes, with zeros where nothing was sent."""
    experts = {
        name: torch.zeros(value.shape).index_copy(0, _moved_experts(name, update), travelled.experts[name])
        for name, value in plan.adapter.experts.items()
    }
    attention = {
        name: travelled.attention[name] if is_trained(name, update.trainable) else torch.zeros(value.shape)
        for name, value in plan.adapter.attention.items()
    }
    return Adapter(experts, attention)


def _packed(kind: str, message: _Message, tensors: dict[str, Tensor]) -> bytes:
    known = (int, float, str, NoneType)
    scalars = {name: value for name, value in vars(message).items() if isinstance(value, known)}
    return pack(tensors, {"kind": kind, **scalars})


def _unpack(kind: str, body: Bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, header = unpack(body)
    except ValueError as error:
        raise InvalidMessage(f"not a fedflame {kind}: {error}") from error
    if header.get("kind") != kind:
        raise InvalidMessage(f"got a message of kind {header.get('kind')!r}; {kind!r} is needed")
    return tensors, header


def _build(cls: type[Any], header: dict[str, Any], tensors: dict[str, Tensor], **parts: Adapter) -> Any:
    scalars = {name: value for name, value in header.items() if name != "kind"}
    arrays = {name: tensors[name] for name in ("rescaler_values", "counts") if name in tensors}
    given = [*scalars, *arrays, *parts]
    hints = get_type_hints(cls)
    types = {field.name: hints[field.name] for field in fields(cls)}
    if sorted(given) != sorted(types):  # defaults are for callers: a message has every field once
        wrong = sorted(set(given) ^ set(types)) or sorted(name for name in types if given.count(name) > 1)
        raise InvalidMessage(f"fields missing, unknown or said twice: {', '.join(wrong)}")
    message = cls(**scalars, **arrays, **parts)
    for name, wanted in types.items():
        _require_type(name, wanted, getattr(message, name))
    return message


def _require_type(name: str, wanted: Any, value: object) -> None:
    """Refuse values of a wrong type: JSON allows NaN for `tokens`, which would pass every comparison."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InvalidMessage(f"{name} is an integer of more than 64 bits")
    if get_origin(wanted) is Literal and value not in get_args(wanted):
        raise InvalidMessage(f"{name} is {value!r}; {', '.join(get_args(wanted))} are allowed")
    allowed = _TYPES.get(wanted)
    if allowed is not None and type(value) not in allowed:
        words = " or ".join(kind.__name__ for kind in allowed)
        raise InvalidMessage(f"{name} is of type {type(value).__name__}; {words} is needed")


def _require_names(got: Collection[str], wanted: Collection[str]) -> None:
    if different := sorted(set(got) ^ set(wanted)):
        raise InvalidMessage(f"tensors missing or unknown: {', '.join(different[:3])}")


def _require(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if value.shape != shape or value.dtype != dtype:
        got = f"{value.dtype} {tuple(value.shape)}"
        raise InvalidMessage(f"{name} is {got}; the plan and the counts make it {dtype} {shape}")
