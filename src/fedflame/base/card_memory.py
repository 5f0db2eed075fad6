"""Find out whether a base and its training fit the memory of the cards, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedflame.base.device import ALL_CARDS, Card, DeviceChoice, gigabytes
from fedflame.config.sections import AdapterConfig
from fedflame.config.words import Checkpointed, Dtype
from fedflame.cost.memory import least_evaluation_memory, least_training_memory
from fedflame.cost.model_shape import ModelShape
from fedflame.errors import UserError


@dataclass(frozen=True)
class Need:
    """What one process takes at least, whatever k and the tokens of a step are."""

    size: int
    """In bytes."""
    work: str
    """What it does, such as "evaluating"."""
    parts: str
    """What takes the memory."""
    advice: str
    """What takes less."""


def training_need(
    shape: ModelShape, adapter: AdapterConfig, dtype: Dtype, work: str, all_gradients: bool = False
) -> Need:
    """Return what training takes; `work` is what `training_words` says of it. See `least_training_memory`."""
    size = least_training_memory(shape, adapter.r, adapter.target_modules, dtype, all_gradients)
    parts = f"the base in {dtype} and the adapter of rank {adapter.r} with its moments"
    return Need(size, work, parts, f"{_narrower(dtype)}a smaller adapter.r, ")


def training_words(
    k: int, tokens_per_step: int, sequences: int, packed: bool, checkpointing: Checkpointed
) -> str:
    """Return in words what decides the memory of a step: its tokens, or its rows or packed sequences."""
    by_sequences = f"{sequences} {'packed sequences' if packed else 'rows'}"
    batch = f"{tokens_per_step:,} tokens" if tokens_per_step else by_sequences
    return f"training at k = {k} with {batch} per batch and gradient_checkpointing = {checkpointing!r}"


def evaluation_need(shape: ModelShape, adapter: AdapterConfig, dtype: Dtype) -> Need:
    """Return what an evaluation takes."""
    size = least_evaluation_memory(shape, adapter.r, adapter.target_modules, dtype)
    return Need(size, "evaluating", f"the base in {dtype} and the adapter", _narrower(dtype))


def _narrower(dtype: Dtype) -> str:
    return "model.dtype = 'bfloat16', " if dtype == "float32" else ""


def spread_if_needed(device: DeviceChoice, need: Need) -> DeviceChoice:
    """Return the device, or all its cards together where the need exceeds the first, but not all of them."""
    if len(device.cards) < 2 or not needs_all_cards(need.size, map(_free_bytes, device.cards)):
        return device
    reason = f"{gigabytes(need.size)} are more than one card has free; slowly: one card works at a time"
    return replace(device, name=ALL_CARDS, reason=reason)


def needs_all_cards(needed: int, free: Iterable[int]) -> bool:
    """Return whether so many bytes exceed what the first card has free, but not what all cards have.

    The others are asked only if the first has too little: the question itself takes memory of a card.
    """
    asked = iter(free)
    first = next(asked)
    return first < needed <= first + sum(asked)


def require_room(device: DeviceChoice, need: Need, copies: int = 1) -> None:
    """Raise UserError if the need, of so many processes on one card, exceeds the memory of the card.

    Of a CPU nothing is required: what its memory does not hold is mapped from files.
    """
    needed = copies * need.size
    if not device.cards or needed <= device.memory:
        return
    several, fewer = (f" in {copies} workers on a card", "fewer workers, ") if copies > 1 else ("", "")
    raise UserError(
        f"{need.work} takes at least {gigabytes(needed)}{several} for {need.parts}, whatever k and tokens "
        f"are; {device.name} ({device.cards[0].model}) has {gigabytes(device.memory)}; take {fewer}"
        f"{need.advice}a card with more memory, several cards, or device = 'cpu'"
    )


def _free_bytes(card: Card) -> int:
    import torch

    return torch.cuda.mem_get_info(card.name)[0]
