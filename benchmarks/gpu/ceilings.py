"""What no step on this card can pass: the rate of one large product, and the rate of a copy."""

from __future__ import annotations

import torch
from findings import Findings
from sizes import Sizes

from fedflame.bench.measurement import median_seconds
from fedflame.bench.step import product_flops


def measure(sizes: Sizes, findings: Findings) -> None:
    source = torch.zeros(sizes.copied, dtype=torch.int8, device=sizes.device)
    target = torch.empty_like(source)
    taken = median_seconds(lambda: target.copy_(source), sizes.device, 10)
    findings.add(
        "ceilings",
        product_flops=product_flops(sizes.device, sizes.product),
        copy_bytes_per_second=2 * sizes.copied / taken,
    )
