"""Every key of the section `strategy`; the docstring of a field is its help."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from fedflame.config.methods import METHODS, NAMED_METHODS
from fedflame.config.settings import Section
from fedflame.config.values import MedianNoneOrNumber, MinFullOrNumber
from fedflame.config.words import CountedRows, CountNormalization, RescalerRule, RobustRule


def _known_method(name: str) -> str:
    if name not in METHODS:
        *known, last = map(repr, NAMED_METHODS)
        raise PydanticCustomError("literal_error", f"Input should be {', '.join(known)} or {last}")
    return name


class StrategyConfig(Section):
    name: Annotated[str, AfterValidator(_known_method)] = "flame"
    """The federated method: flame, fedavg, ffa_lora, rolora, fedex_lora, hetlora, flexlora or flora.
    docs/strategies.md compares them."""
    temperature: Annotated[float, Field(ge=0, le=8)] = 1.0
    """FLAME: the exponent t on the activation frequency. 0 gives the weights of FedAvg; the paper finds 2 to
    4 good. The larger t is, the more the clients with a large k decide. Above 8 the weights of rarely used
    experts would vanish in fp32."""
    rescaler: RescalerRule = "learned"
    """FLAME: how clients with k < K rescale the routed output. `learned` is the paper's; `none` leaves it,
    `static` multiplies by K/k, `mass` by a measured ratio of routing weights."""
    count_normalization: CountNormalization = "slot"
    """FLAME: what activation counts are divided by. `token`: the tokens, as in the paper, which gives a
    client with a large k more weight. `slot`: the routed slots, k for each token."""
    tier_affinity: Annotated[float, Field(ge=0, le=1)] = 0.7
    """FLAME: the server keeps an adapter for every k of the clients. An update that was trained with k'
    counts in the adapter of k with this number to the power of the doublings between k and k': 1, 0.7, 0.49
    and so on. 1: one adapter for all, as in the paper. 0: every k learns from its own clients only."""
    k_rotation: Literal["auto", "none", "smaller", "all"] = "auto"
    """FLAME: the k that a client trains with. `none`: what it affords, as in the paper. `smaller`: in every
    second round what it affords, and between them the smaller k of other clients in turn. `all`: also the
    larger ones, with fewer steps, so that a round costs no more. `auto`: `all` if training.budget is compute,
    otherwise `smaller`."""
    learning_rate_exponent: Annotated[float, Field(ge=0, le=1)] = 0.0
    """FLAME: a client that trains with k experts has the learning rate times (K/k) to this power. 0: the same
    rate for every k."""
    active_experts: MinFullOrNumber = "min"
    """fedavg, ffa_lora, rolora, fedex_lora: the k of every client. `min`: what the smallest client affords
    (the paper's baseline); `full`: the model's K; or a number."""
    rank: MinFullOrNumber = "full"
    """fedavg, ffa_lora, rolora, fedex_lora: the LoRA rank of every client. `full`: adapter.r; `min`: what the
    smallest client affords; or a number."""
    counted_rows: CountedRows = "trained"
    """All methods but hetlora: which rows are a client's weight |D_i| in a mean. `held`: all its rows, as
    published. `trained`: the rows that it trained on in the round, each counted once. They differ where
    `training.max_steps` do not reach all rows: with `held`, a client with many rows then counts for more than
    it has done."""
    clip: MedianNoneOrNumber = "median"
    """All methods: the largest pace of an update; one that went further is scaled down. `median`: 1.5 times
    the median pace in earlier rounds, and for the first round in that round. `none`: as far as AdamW can go.
    Or a number. A pace is the root mean square of what values moved, over learning rate times the root of the
    steps, where the rate is constant; honest ones are about 1. Learned rescalers are bounded likewise."""
    robust: RobustRule = "none"
    """flame, fedavg, ffa_lora, rolora: how values are averaged, per expert over the clients that activated
    it. `none`: by weight. `trimmed_mean`: by weight, without the largest and the smallest value of each
    coordinate. `geometric_median`: the point with the least weighted distance to all, for each expert and
    bank. With fewer than three clients on an expert: by weight."""
    rank_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """HetLoRA: gamma of rank self-pruning, such as 0.9. A client whose last ranks, those after the first
    gamma r_i, shrank in a round goes on without them. 0: no pruning."""
