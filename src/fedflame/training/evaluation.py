"""Evaluate the global model on held-out rows at one k: loss and, by generation, exact match and ROUGE-L."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedflame.data.batches import IGNORE_INDEX, collate
from fedflame.data.conversations import Conversation
from fedflame.data.encoder import Encoder, pad_token
from fedflame.data.encoding import EncodedPrompt, EncodedRow
from fedflame.messages import NOTHING, Adapter
from fedflame.moe.adapted_model import AdaptedModel
from fedflame.training.scores import Scores
from fedflame.training.token_loss import token_losses

BATCH_ROWS, BATCH_TOKENS = 50, 16_384
"""Largest number of rows and of tokens in a batch on a CPU. The limit on tokens bounds the memory."""
GPU_SHARE = 0.5
"""Share of a GPU's free memory that a batch may take by our estimate, which misses some things."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows with their encodings, and how answers are generated and scored."""

    rows: Sequence[Conversation]
    encoded: Sequence[EncodedRow]
    """In the order of `rows`."""
    prompts: Sequence[EncodedPrompt]
    """What answers are generated from, in the order of `rows`; empty if none are."""
    encoder: Encoder
    max_new_tokens: int
    """Largest number of tokens generated per row; 0 means loss only."""
    batch_rows: int = BATCH_ROWS
    """Largest number of rows in a batch on a CPU. The scores do not depend on it."""

    def first_rows(self, count: int) -> HeldOut:
        """Return the same with the first rows alone."""
        return replace(
            self, rows=self.rows[:count], encoded=self.encoded[:count], prompts=self.prompts[:count]
        )

    def width(self, index: int) -> int:
        """Return the most tokens that a row takes: the row or its prompt, and an answer."""
        prompt = len(self.prompts[index].ids) if self.prompts else 0
        return max(len(self.encoded[index].ids), prompt) + self.max_new_tokens


def evaluate(
    adapted: AdaptedModel,
    held_out: HeldOut,
    adapter: Adapter,
    k: int,
    rescaler_values: Tensor,
    generate: bool,
    merged: Adapter = NOTHING,
    on_batch: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Scores]:
    """Return category -> scores of an adapter on held-out rows with k active experts.

    Args:
        adapted: the base model; it loads `adapter`, `rescaler_values` and `merged`.
        held_out: the rows, and how answers are generated.
        adapter: the LoRA values.
        k: experts per token.
        rescaler_values: [L] s per MoE layer of tier k.
        generate: whether to generate answers for exact match and ROUGE-L.
        merged: factors merged into the base; see `ServerState.merged`.
        on_batch: called after every batch with the number of its tokens, without padding and answers.

    Raises:
        UserError: the values do not fit the model, or k is not between 1 and the model's K.
    """
    adapted.load(adapter, rescaler_values, merged)
    # Rows of similar length share a batch; the scores do not depend on it.
    order = sorted(range(len(held_out.rows)), key=lambda index: len(held_out.encoded[index].ids))
    scores: dict[str, Scores] = {}
    with torch.no_grad(), adapted.active_experts(k):
        for batch in _batches(order, held_out, *_limits(adapted, held_out, k)):
            for index, row_scores in zip(batch, _score_rows(adapted, held_out, batch, generate), strict=True):
                category = held_out.rows[index].category
                scores[category] = scores[category] + row_scores if category in scores else row_scores
            on_batch(sum(len(held_out.encoded[index].ids) for index in batch))
    return dict(sorted(scores.items()))


def _limits(adapted: AdaptedModel, held_out: HeldOut, k: int) -> tuple[int, int]:
    """Return the most rows and tokens of a batch: on a GPU, as many as its free memory has room for."""
    if adapted.device.type != "cuda":
        return held_out.batch_rows, BATCH_TOKENS
    free = min(_free_bytes(device) for device in adapted.devices)
    # A power of two: the same on every run, as long as about the same is free.
    tokens = 2 ** int(math.log2(max(2.0, GPU_SHARE * free / bytes_per_token(adapted, k))))
    return tokens, tokens


def _free_bytes(device: torch.device) -> int:
    """Return what the driver has left, and what torch holds without using it."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def bytes_per_token(adapted: AdaptedModel, k: int) -> int:
    """Estimate what a token takes: its keys and values of every layer, and the rows of a running layer."""
    layer, config = adapted.layers[0], adapted.model.config.get_text_config()
    cache = 2 * config.num_hidden_layers * config.hidden_size
    routed = k * (3 * layer.hidden_size + (layer.inner_projections + 2) * layer.expert_width)
    beside = 16 * config.hidden_size  # attention, norms and residuals, some of them in float32
    return int(adapted.model.dtype.itemsize * (cache + routed + beside))


def _batches(
    rising: Sequence[int], held_out: HeldOut, most_rows: int, most_tokens: int
) -> Iterator[list[int]]:
    """Yield batches of row indices, in ascending length, within the limits with padding and answers."""
    batch: list[int] = []
    width = 0
    for index in rising:
        width = max(width, held_out.width(index))
        if batch and (len(batch) == most_rows or (len(batch) + 1) * width > most_tokens):
            yield batch
            batch, width = [], held_out.width(index)
        batch.append(index)
    if batch:
        yield batch


def _score_rows(adapted: AdaptedModel, held_out: HeldOut, indices: list[int], generate: bool) -> list[Scores]:
    batch = collate([held_out.encoded[index] for index in indices], pad_token(held_out.encoder.tokenizer))
    lengths = (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
    losses = [float(row.sum()) for row in token_losses(adapted, batch).cpu().split(lengths)]
    if not generate or held_out.max_new_tokens == 0:
        return [Scores(1, loss, tokens) for loss, tokens in zip(losses, lengths, strict=True)]
    rows = [held_out.rows[index] for index in indices]
    answers = generate_responses(adapted, held_out, indices)
    from rouge_score.rouge_scorer import RougeScorer  # it imports NLTK, which takes half a second

    from fedflame.training.words import AnyScript

    scorer = RougeScorer(["rougeL"], tokenizer=AnyScript())
    return [
        Scores(
            1,
            loss,
            tokens,
            int(row.response.strip() == answer),
            scorer.score(row.response, answer)["rougeL"].fmeasure,
        )
        for row, answer, loss, tokens in zip(rows, answers, losses, lengths, strict=True)
    ]


def generate_responses(adapted: AdaptedModel, held_out: HeldOut, indices: Sequence[int]) -> list[str]:
    """Generate greedy answers with prompts padded on the left; return them as stripped text.

    Of a model that thinks aloud, the answer is what follows `</think>`.
    """
    tokenizer = held_out.encoder.tokenizer
    pad, prompts = pad_token(tokenizer), [held_out.prompts[index].ids for index in indices]
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model: Any = adapted.model
    output = model.generate(
        input_ids=input_ids.to(adapted.device),
        attention_mask=attention_mask.to(adapted.device),
        do_sample=False,
        max_new_tokens=held_out.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=held_out.encoder.end_tokens,
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [text.rpartition("</think>")[2].strip() for text in texts]
