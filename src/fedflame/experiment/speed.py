"""How many tokens per second a model takes in and gives out, with the adapter and the k that it has now."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedflame.moe.adapted_model import AdaptedModel
from fedflame.seeds import generator

PROMPT_TOKENS, NEW_TOKENS = 512, 32
"""Of the one row that is timed; the prompt is shorter where the model's context is."""
REPEATS = 3
"""After one that warms up; the median counts."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second for one row."""

    prompt: float
    """From the prompt to the first new token."""
    new: float
    """From the first new token on."""


def measure_speed(adapted: AdaptedModel) -> Speed:
    """Time greedy generation for one row of random tokens.

    The k experts of a token cost the same whichever they are, so that the text does not matter.
    """
    context = getattr(adapted.model.config.get_text_config(), "max_position_embeddings", None)
    length = min(PROMPT_TOKENS, (context or PROMPT_TOKENS + NEW_TOKENS + 1) - NEW_TOKENS - 1)
    prompt = torch.randint(adapted.vocabulary, (1, length), generator=generator(0, "speed"))
    prompt = prompt.to(adapted.device)
    _seconds(adapted.model, prompt, 1 + NEW_TOKENS)
    first = statistics.median(_seconds(adapted.model, prompt, 1) for _ in range(REPEATS))
    all_of_it = statistics.median(_seconds(adapted.model, prompt, 1 + NEW_TOKENS) for _ in range(REPEATS))
    return Speed(length / first, NEW_TOKENS / max(all_of_it - first, 1e-9))


def _seconds(model: Any, prompt: Tensor, new_tokens: int) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
    output.cpu()  # waits for the device
    return time.perf_counter() - start
