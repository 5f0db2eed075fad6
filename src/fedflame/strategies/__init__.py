"""Federated methods, one per file: what each client trains, and how the server averages.

`flame` is the paper's method: clients differ in experts per token. `hetlora`, `flexlora` and `flora` let
them differ in rank. `fedavg` treats all alike, and with it `ffa_lora` and `rolora`, which send one half of
the adapter, and `fedex_lora`, which averages products exactly. `base` has the three hooks that a method
implements and what several share. A new method is one file here with a frozen dataclass, and a row in
`config.methods`; docs/strategies.md has all of them side by side.
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
