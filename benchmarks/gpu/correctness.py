"""Whether the card computes what a loop over the experts computes, at small sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from eager import eager
from findings import Findings
from sizes import SMALL, Sizes
from torch import Tensor, nn
from torch.nn.functional import silu
from waits import waits

from fedflame.bench.measurement import TOLERANCE_IN_EPSILONS
from fedflame.bench.step import (
    LEARNING_RATE,
    Launched,
    adapt,
    labelled_batch,
    olmoe_config,
    random_olmoe,
    step_optimizer,
    training_step,
)
from fedflame.data.batches import collate
from fedflame.data.encoding import EncodedRow
from fedflame.moe.expert_lora import BANKS, ExpertLoRA
from fedflame.moe.masked_adamw import Moments, masked_adamw
from fedflame.training.clipped_sums import clipped_sums
from fedflame.training.steps import training_steps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPERTS = ((torch.bfloat16, 8), (torch.bfloat16, 1), (torch.float32, 8), (torch.float16, 1))
"""Number formats and k in which a layer's experts are checked: each is compiled anew."""
KINDS: dict[str, Callable[[], AbstractContextManager[None]]] = {"compiled": nullcontext, "eager": eager}
IDLE = [0, 13, 31]
"""Experts of the 32 without a token."""
TOKENS = 40
LOADS = (0, 37, 1, 0, 0, 150, 16, 0)
"""Rows of each expert, for a product alone."""
CONFIG = olmoe_config(SMALL.config, 2)
ROWS = [EncodedRow(list(range(3, 3 + length)), 2, False) for length in (21, 13, 7)]
CLIP_NORM = 1e-3
"""Below the norm of any of these rows' gradients."""


def measure(sizes: Sizes, findings: Findings) -> None:
    with findings.attempt("captured steps"):
        check_captured(sizes.device, findings)
    for dtype, k in EXPERTS:
        with findings.attempt(f"experts, {dtype}, k = {k}"):
            check_experts(sizes.device, dtype, k, findings)
    with findings.attempt("Triton's products"):
        check_triton(sizes.device, findings)
    with findings.attempt("masked AdamW"):
        check_adamw(sizes.device, findings)
    with findings.attempt("whole steps"):
        check_steps(sizes.device, findings)
    with findings.attempt("clipped rows"):
        check_clipped(sizes.device, findings)


def check(findings: Findings, name: str, error: float, allowed: float) -> None:
    findings.add("checks", check=name, error=error, allowed=allowed)


def check_experts(device: str, dtype: torch.dtype, k: int, findings: Findings) -> None:
    """Output and all gradients of one layer's experts, twice, against a loop in float64."""
    experts, values, chosen, d_y = experts_case(device, dtype, k)
    exact = looped(experts, values, chosen, d_y)
    allowed = TOLERANCE_IN_EPSILONS * torch.finfo(dtype).eps
    for kind, context in KINDS.items():
        name = f"{kind} experts, {str(dtype).removeprefix('torch.')}, k = {k}"
        with context():
            found, again = (fused(experts, values, chosen, d_y) for _ in range(2))
        errors = {what: relative_error(found[what], exact[what]) for what in exact}
        worst = max(errors, key=lambda what: errors[what])
        check(findings, f"{name}: worst in {worst}", errors[worst], allowed)
        differs = any(not torch.equal(found[what], again[what]) for what in found)
        check(findings, f"{name}: other bytes when run again", float(differs), 0.0)


def experts_case(
    device: str, dtype: torch.dtype, k: int
) -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """Experts with random banks, what they are applied to without the `IDLE`, the gradient of the output."""
    adapted = adapt(random_olmoe(CONFIG, dtype, device, balanced=False))
    generator = torch.Generator().manual_seed(k)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    draw_banks(adapted.loras[0], generator)
    x, d_y = (drawn(TOKENS, CONFIG.hidden_size).to(dtype) for _ in range(2))
    preference = drawn(TOKENS, CONFIG.num_experts)
    preference[:, IDLE] = -torch.inf
    weights, chosen = preference.softmax(1).topk(k)
    leaves = {"x": x.requires_grad_(), "weights": weights.to(dtype).requires_grad_()}
    return adapted.layers[0].experts, leaves | adapted.loras[0].banks(), chosen, d_y


def draw_banks(lora: ExpertLoRA, generator: torch.Generator) -> None:
    """Give the banks of a layer values without a zero: the same ones on every device."""
    with torch.no_grad():
        for bank in lora.banks().values():
            bank.copy_(0.1 * torch.randn(bank.shape, generator=generator))


def fused(experts: nn.Module, values: Mapping[str, Tensor], chosen: Tensor, d_y: Tensor) -> dict[str, Tensor]:
    poison(d_y.device)
    output = experts(values["x"], chosen, values["weights"])
    return {"output": output.detach(), **gradients(output, values, d_y)}


def looped(
    experts: nn.Module, values: Mapping[str, Tensor], chosen: Tensor, d_y: Tensor
) -> dict[str, Tensor]:
    """The definition, expert by expert, in float64 under autograd."""
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    scaling = experts.fedflame.scaling
    output = torch.zeros_like(exact["x"])
    for expert in range(CONFIG.num_experts):
        tokens, slots = (chosen == expert).nonzero(as_tuple=True)
        a1, b1, a2, b2 = (exact[name][expert] for name in BANKS)
        rows = exact["x"][tokens]
        low = (rows @ a1.T).chunk(2, 1)
        inner = (rows @ experts.gate_up_proj[expert].double().T).chunk(2, 1)
        gate, up = (
            base + scaling * part @ b.T for base, part, b in zip(inner, low, b1.chunk(2), strict=True)
        )
        active = silu(gate) * up
        rows = active @ experts.down_proj[expert].double().T + scaling * (active @ a2.T) @ b2.T
        output = output.index_add(0, tokens, rows * exact["weights"][tokens, slots].unsqueeze(1))
    return {"output": output.detach(), **gradients(output, exact, d_y.double())}


def gradients(output: Tensor, values: Mapping[str, Tensor], d_y: Tensor) -> dict[str, Tensor]:
    """By name; of the banks for the experts with tokens only, since the others' are not defined."""
    found = dict(zip(values, torch.autograd.grad(output, list(values.values()), d_y), strict=True))
    used = [expert for expert in range(CONFIG.num_experts) if expert not in IDLE]
    return {name: value[used] if name in BANKS else value for name, value in found.items()}


def poison(device: torch.device) -> None:
    """Fill the memory that is free, and that torch's allocator hands out next, with NaN."""
    torch.cuda.empty_cache()
    held = [torch.full((size,), torch.nan, device=device) for size in (2**8, 2**12, 2**17, 2**22) * 8]
    del held


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def check_triton(device: str, findings: Findings) -> None:
    """Both products against a loop in float64. Off a card the interpreter runs them, in float32 only."""
    if find_spec("triton") is None:
        return
    from fedflame.moe.triton_products import outer, times

    offsets = torch.tensor(LOADS, device=device).cumsum(0).to(torch.int32)
    for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
        rows, others, weights = (
            torch.randn(shape, device=device).to(dtype)
            for shape in ((sum(LOADS), 72), (sum(LOADS), 24), (len(LOADS), 72, 24))
        )
        parts, other_parts = rows.double().split(LOADS), others.double().split(LOADS)
        poison(rows.device)
        found = {"times": times(rows, weights, offsets), "outer": outer(rows, others, offsets)}
        exact = {
            "times": torch.cat([part @ w for part, w in zip(parts, weights.double(), strict=True)]),
            "outer": torch.stack([a.T @ b for a, b in zip(parts, other_parts, strict=True)]),
        }
        for name, value in found.items():
            error = relative_error(value, exact[name])
            check(
                findings, f"Triton's {name}, {dtype}", error, TOLERANCE_IN_EPSILONS * torch.finfo(dtype).eps
            )


def check_adamw(device: str, findings: Findings) -> None:
    """Three masked steps, compiled against eager; the gradients of untouched experts are NaN."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 40, 24, generator=generator).to(device)
    steps = []
    for _ in range(3):
        touched = torch.rand(12, generator=generator) < 0.5
        gradient = torch.randn(start.shape, generator=generator)
        gradient[~touched] = torch.nan
        steps.append((gradient.to(device), touched.to(device)))
    results = {}
    for kind, context in KINDS.items():
        bank, moments = start.clone(), Moments.of(start)
        with context():
            for gradient, touched in steps:
                masked_adamw(bank, moments, gradient, touched, 0.01, 0.1)
        results[kind] = bank
    error = relative_error(results["compiled"], results["eager"].double())
    check(findings, "masked AdamW, compiled against eager", error, 1e-6)


def check_captured(device: str, findings: Findings) -> None:
    """A round of captured steps against the same steps without a graph, in bfloat16, and once more."""
    launched: tuple[Launched, ...] = ("compiled", "captured", "captured")
    rounds = [small_round(device, how) for how in launched]
    (losses, counts), (found, captured_counts), (again, _) = rounds
    worst = max(abs(a - b) / b for a, b in zip(found, losses, strict=True))
    check(findings, "losses of captured steps against compiled ones", worst, 1e-2)
    check(findings, "counts of captured steps: differences", float((counts != captured_counts).sum()), 0.0)
    check(findings, "captured steps: other losses when run again", float(found != again), 0.0)


def small_round(device: str, launched: Launched) -> tuple[list[float], Tensor]:
    """The losses of ten steps of falling rates, on batches of two sizes in turn, and the counts."""
    adapted = adapt(random_olmoe(CONFIG, torch.bfloat16, device))
    optimizer = step_optimizer(adapted)
    step = training_steps(adapted, optimizer, capture=launched == "captured")
    batches = [labelled_batch(CONFIG.vocab_size, 3, 20), collate(ROWS, 0)]
    with adapted.training(8):
        losses = []
        for number in range(10):
            optimizer.set_learning_rate(LEARNING_RATE / (1 + number))
            losses.append(float(step(batches[number % 2])))
    return losses, adapted.counts.total.cpu()


def check_steps(device: str, findings: Findings) -> None:
    """Losses of compiled and of eager steps in float32, and the waits of steps in every number format."""
    losses = {}
    for kind, context in KINDS.items():
        with context():
            losses[kind] = [float(step()) for step in small_steps(device, torch.float32).values()]
    pairs = zip(losses["compiled"], losses["eager"], strict=True)
    check(findings, "losses of steps, compiled against eager", max(abs(a - b) for a, b in pairs), 1e-4)
    for dtype, kind in ((torch.bfloat16, "compiled"), (torch.bfloat16, "eager"), (torch.float32, "eager")):
        with KINDS[kind]():
            for name, step in small_steps(device, dtype).items():
                for _ in range(2):
                    step()
                findings.add("waits", step=f"{kind}, {dtype}, {name}", waits=waits(step, device))


def small_steps(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Training steps on one model, with padding and without, at K and at k = 1."""
    adapted = adapt(random_olmoe(CONFIG, dtype, device))
    optimizer = step_optimizer(adapted)
    batches = {
        "rows of one length": labelled_batch(CONFIG.vocab_size, 3, 20),
        "padded rows": collate(ROWS, 0),
    }
    return {
        f"{name}, k = {k}": training_step(adapted, optimizer, batch, k)
        for name, batch in batches.items()
        for k in (8, 1)
    }


def check_clipped(device: str, findings: Findings) -> None:
    """The clipped sum of a private step by ghost norms, twice, against one row at a time, in float32."""
    adapted = adapt(random_olmoe(CONFIG, torch.float32, device))
    generator = torch.Generator().manual_seed(0)
    for lora in adapted.loras:
        draw_banks(lora, generator)
    units = [[row] for row in ROWS]
    with adapted.training(8):
        sums = [clipped_sums(adapted, units, CLIP_NORM, how, 0) for how in ("ghost", "ghost", "row")]
    found, again, alone = (torch.cat([value.flatten() for value in of.values()]) for of in sums)
    error = relative_error(found, alone.double())
    check(findings, "clipped rows, by norms against one at a time", error, 1e-4)
    check(findings, "clipped rows: the norm of the sum, at most", float(found.norm()), len(ROWS) * CLIP_NORM)
    check(findings, "clipped rows: other bytes when run again", float(not torch.equal(found, again)), 0.0)
