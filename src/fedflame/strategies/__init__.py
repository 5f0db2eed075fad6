"""Federated methods, one per file: what each client trains, and how the server aggregates.

`flame` is the paper's method: clients differ in the experts that they run per token. In `hetlora`, `flexlora`
and `flora` they differ in rank. In the others all clients are alike: `fedavg` averages A and B, `ffa_lora`
and `rolora` train one of the two at a time, and `fedex_lora` averages the products exactly. `base` holds the
three hooks that a method implements, and functions that several methods share. A new method is one file here
with a frozen dataclass, and a row in `config.methods`. docs/strategies.md compares the methods.
"""

from __future__ import annotations

from fedflame.strategies.base import Strategy
from fedflame.strategies.fedavg import FedAvg
from fedflame.strategies.fedex_lora import FedExLoRA
from fedflame.strategies.ffa_lora import FFALoRA
from fedflame.strategies.flame import Flame
from fedflame.strategies.flexlora import FlexLoRA
from fedflame.strategies.flora import FLoRA
from fedflame.strategies.hetlora import HetLoRA
from fedflame.strategies.rolora import RoLoRA

__all__ = [
    "FFALoRA",
    "FLoRA",
    "FedAvg",
    "FedExLoRA",
    "Flame",
    "FlexLoRA",
    "HetLoRA",
    "RoLoRA",
    "Strategy",
]
