"""The table of federated methods: one row says all that the rest of the package knows about a method.

The row names the strategy class instead of importing it, so that a configuration, a plan or a report needs no
torch. A new method is one file in `strategies/` and one row here; docs/new-method.md has the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedflame.config.words import Trainable


@dataclass(frozen=True)
class Method:
    """What is known about one method before any of its code is loaded."""

    title: str
    """How texts call it, with its paper."""
    strategy: str
    """Module and class, such as `fedflame.strategies.fedavg:FedAvg`; empty for one that a caller hands over.

    Each field of the class that is named like an option takes the option's value."""
    options: frozenset[str] = field(default_factory=frozenset)
    """Keys of the section `strategy` that the method reads; the others must be left at their defaults."""
    experts: Literal["in_turn", "afforded", "chosen", "full"] = "chosen"
    """The k that a client trains with: what `strategy.k_rotation` gives it, what it affords, what
    `strategy.active_experts` says for all clients, or the model's K."""
    ranks: Literal["afforded", "chosen", "full"] = "chosen"
    """The LoRA rank that a client trains: what it affords, `strategy.rank` for all, or adapter.r."""
    halves: tuple[Trainable, ...] = ("both",)
    """What clients train and send of each product B A; of several, one after the other in turn."""
    merges: bool = False
    """Whether each round adds the ranks of its clients to the factors that are merged into the base."""
    keeps_factors: bool = True
    """Whether a client's next round goes on from the factors of the last; where not, what rounding takes from
    an update cannot be made up for in the next one."""
    deploys: Literal["adapter", "own_ranks"] = "adapter"
    """What a device uses after the run: the whole adapter, or its first ranks, as many as it affords."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """Keys of the section `strategy` that make no sense for the method, and why."""


OF_ALL_METHODS = frozenset({"name", "clip"})
"""Keys of the section `strategy` that no method reads, because they hold for all."""

_ALIKE = frozenset({"active_experts", "rank", "counted_rows"})
_AVERAGED = _ALIKE | {"robust"}
_EXACT = {"robust": "it adds up products B A, in which every client's factors stay whole"}
_PADS = {"robust": "the padding zeros of small clients would outvote those who train the last ranks"}

METHODS: dict[str, Method] = {
    "flame": Method(
        "FLAME (arXiv 2506.16600)",
        "fedflame.strategies.flame:Flame",
        frozenset(
            {
                "temperature",
                "rescaler",
                "count_normalization",
                "tier_affinity",
                "k_rotation",
                "learning_rate_exponent",
                "counted_rows",
                "robust",
            }
        ),
        experts="in_turn",
        ranks="full",
    ),
    "fedavg": Method("FedAvg (arXiv 1602.05629)", "fedflame.strategies.fedavg:FedAvg", _AVERAGED),
    "ffa_lora": Method(
        "FFA-LoRA (arXiv 2403.12313)",
        "fedflame.strategies.ffa_lora:FFALoRA",
        _AVERAGED,
        halves=("B",),
    ),
    "rolora": Method(
        "RoLoRA (arXiv 2409.02346)",
        "fedflame.strategies.rolora:RoLoRA",
        _AVERAGED,
        halves=("B", "A"),
    ),
    "fedex_lora": Method(
        "FedEx-LoRA (arXiv 2410.09432)",
        "fedflame.strategies.fedex_lora:FedExLoRA",
        _ALIKE,
        merges=True,
        lacks=_EXACT,
    ),
    "hetlora": Method(
        "HetLoRA (arXiv 2401.06432)",
        "fedflame.strategies.hetlora:HetLoRA",
        frozenset({"rank_decay"}),
        experts="full",
        ranks="afforded",
        lacks={
            "robust": "the zeros of clients with a smaller rank would outvote those who train the last ranks"
        },
        deploys="own_ranks",
    ),
    "flexlora": Method(
        "FlexLoRA (arXiv 2402.11505)",
        "fedflame.strategies.flexlora:FlexLoRA",
        frozenset({"counted_rows"}),
        lacks=_EXACT,
        experts="full",
        ranks="afforded",
        deploys="own_ranks",
    ),
    "flora": Method(
        "FLoRA (arXiv 2409.05976)",
        "fedflame.strategies.flora:FLoRA",
        frozenset({"counted_rows"}),
        lacks=_EXACT,
        experts="full",
        ranks="afforded",
        merges=True,
        keeps_factors=False,
    ),
    "custom": Method("a method of its own", "", experts="afforded", ranks="full"),
}
"""By `strategy.name`. `custom` is an object that a program hands to `fedflame.run`."""

NAMED_METHODS = tuple(name for name, method in METHODS.items() if method.strategy)
"""Those that a configuration can name."""
