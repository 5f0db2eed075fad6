"""The messages of a round: `RoundPlan` from the server, `ClientUpdate` from the client.

Those of an evaluation at the clients are `EvaluationPlan` and `ClientEvaluation`.

Shapes: L MoE layers, E experts per layer, H hidden size, I expert width, R LoRA rank. The package `wire`
turns messages into bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedflame.config.words import GHOST_TOKENS, Clipping, LRScheduler, RescalerMode, Trainable, UpdateDtype


@dataclass(frozen=True)
class Adapter:
    """The LoRA factors A and B in fp32, or the change (delta) of these factors.

    `experts` holds the banks `"{layer}.A1"` [E,2R,H], `"{layer}.B1"` [E,2I,R], `"{layer}.A2"` [E,R,I]
    and `"{layer}.B2"` [E,H,R]. A1 and B1 hold the rows of gate before those of up. Where experts have no
    gate, they hold up alone: A1 [E,R,H], B1 [E,I,R]. `layer` counts the MoE layers from 0.
    `attention` holds `"{module}.A"` [R,in] and `"{module}.B"` [out,R].
    """

    experts: Mapping[str, Tensor]
    attention: Mapping[str, Tensor]

    def combine(self, other: Adapter, rule: Callable[[Tensor, Tensor], Tensor]) -> Adapter:
        """Return a new adapter: `rule` is applied to each pair of values of the same name."""
        return Adapter(
            {name: rule(value, other.experts[name]) for name, value in self.experts.items()},
            {name: rule(value, other.attention[name]) for name, value in self.attention.items()},
        )

    @property
    def rank(self) -> int:
        """The LoRA rank R; 0 for `NOTHING`."""
        return next((value.shape[1] for name, value in self.experts.items() if name.endswith(".A2")), 0)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the pairs B [...,n,out,R] and A [...,n,R,in], each under the name of its A.

        n is the number of products B A in a value: 2 where A1 and B1 hold gate and up, else 1. A bank has the
        dimension E before n.
        """
        values, found = self.tensors(), {}
        for name, a in values.items():
            if half_of(name) == "A":
                n = a.shape[-2] // self.rank
                found[name] = (values[_b_of(name)].unflatten(-2, (n, -1)), a.unflatten(-2, (n, -1)))
        return found

    @classmethod
    def from_factors(cls, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
        """The inverse of `factors`."""
        values = {}
        for name, (b, a) in factors.items():
            values[name], values[_b_of(name)] = a.flatten(-3, -2), b.flatten(-3, -2)
        return cls.from_tensors(values)

    def tail_norms(self, kept: int) -> tuple[Tensor, Tensor]:
        """Return ||B|| and ||A|| without the first `kept` ranks: Frobenius norms over all modules."""
        pairs = self.factors().values()
        norms_b = [torch.linalg.vector_norm(b[..., kept:], dtype=torch.float64) for b, _ in pairs]
        norms_a = [torch.linalg.vector_norm(a[..., kept:, :], dtype=torch.float64) for _, a in pairs]
        # At zero, the gradient of a norm of norms is zero; that of a square root does not exist.
        return _norm_of(norms_b), _norm_of(norms_a)

    def concatenate(self, *others: Adapter) -> Adapter:
        """Join adapters along the rank: every product B A is the sum of their products.

        Adapters without values (`NOTHING`) are left out.

        Raises:
            KeyError: an adapter lacks a name of the first one.
        """
        parts = [part for part in (self, *others) if part.tensors()]
        if len(parts) < 2:
            return parts[0] if parts else NOTHING
        factors = [part.factors() for part in parts]
        return Adapter.from_factors(
            {
                name: (
                    torch.cat([part[name][0] for part in factors], dim=-1),
                    torch.cat([part[name][1] for part in factors], dim=-2),
                )
                for name in factors[0]
            }
        )

    def with_rank(self, rank: int) -> Adapter:
        """Cut every factor to its first `rank` ranks, or pad it with zeros, which change no product B A."""
        spare = rank - self.rank
        if spare == 0:
            return self
        return Adapter.from_factors(
            {name: (pad(b, (0, spare)), pad(a, (0, 0, 0, spare))) for name, (b, a) in self.factors().items()}
        )

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return all values in one dict, named `{prefix}experts.{name}` and `{prefix}attention.{name}`."""
        experts = {f"{prefix}experts.{name}": value for name, value in self.experts.items()}
        return experts | {f"{prefix}attention.{name}": value for name, value in self.attention.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Adapter:
        """The inverse of `tensors`; other names are ignored."""

        def named(start: str) -> dict[str, Tensor]:
            return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}

        return cls(named(f"{prefix}experts."), named(f"{prefix}attention."))


NOTHING = Adapter({}, {})
"""An adapter without values; its rank is 0."""

MERGED_PREFIX = "merged."
"""Prefix for the names of merged factors in a buffer that also holds an adapter."""


def half_of(name: str) -> str:
    """Return "A" or "B": the LoRA factor that the value of this name belongs to."""
    return name.rpartition(".")[2][:1]


def is_trained(name: str, trainable: Trainable) -> bool:
    """Return whether a client trains the value of this name."""
    return trainable == "both" or half_of(name) == trainable


def rank_dim(name: str) -> int:
    """Return the dimension of this value that has the length of the rank (in A1 twice: gate and up)."""
    return -2 if half_of(name) == "A" else -1


def _norm_of(norms: list[Tensor]) -> Tensor:
    """Return the norm of all values from those of the tensors, which may lie on several devices."""
    whole: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return whole


def _b_of(name: str) -> str:
    """Return the name of the B that belongs to the A of this name."""
    module, _, last = name.rpartition(".")
    return f"{module}.B{last[1:]}"


@dataclass(frozen=True)
class RoundPlan:
    """The server's request to one client for one round."""

    round: int
    client: int
    seed: int
    active_experts: int
    rescaler: RescalerMode
    rescaler_values: Tensor
    """[L] s per MoE layer at the start of the round."""
    adapter: Adapter
    learning_rate: float
    weight_decay: float
    batch_size: int
    """Sequences per batch: rows, or packed sequences of several rows."""
    max_steps: int
    """Largest number of optimizer steps."""
    tokens_per_step: int = 0
    """If not 0, a batch has as many sequences as fit in this many tokens, instead of `batch_size`."""
    packed_length: int = 0
    """If not 0, rows are packed into sequences of at most this many tokens."""
    padding_free: bool = False
    """Whether the rows of a batch lie end to end in one sequence."""
    gradient_accumulation_steps: int = 1
    """Batches of an optimizer step."""
    num_train_epochs: float = 0.0
    """If not 0, the client goes over its rows so many times, in at most `max_steps`."""
    lr_scheduler_type: LRScheduler = "constant"
    """How `learning_rate` falls within the round; see `training.schedule`."""
    warmup_rounds: float = 0.0
    """The rounds at the start of the run in which the learning rate rises."""
    max_grad_norm: float = 0.0
    """If not 0, the largest L2 norm of the gradient of a step."""
    lora_dropout: float = 0.0
    """The chance that an input of an A is dropped in training."""
    trainable: Trainable = "both"
    merged: Adapter = NOTHING
    """Factors of any rank, merged into the base with the scale of `adapter`; see `ServerState.merged`."""
    proximal_mu: float = 0.0
    """FedProx: mu/2 ||w - w_0||^2 is added to the objective; w_0 is `adapter`."""
    router_aux_loss_coef: float = 0.0
    """This times the load-balancing loss of the routers is added to the objective."""
    rank_penalty: float = 0.0
    """HetLoRA: this times ||B|| ||A|| without the first `kept_rank` ranks is added to the objective."""
    kept_rank: int = 0
    update_dtype: UpdateDtype = "float32"
    """The dtype in which the client sends its delta."""
    error_feedback: bool = False
    """Whether the client remembers the rounding error of its delta and adds it to its next delta."""
    clip_norm: float = 0.0
    """If not 0, the client trains privately: the largest L2 norm of a row's gradient. `batch_size` is then
    the expected number of rows in a step, and every round has `max_steps`."""
    clipping: Clipping = "row"
    """How a private round clips."""
    noise_multiplier: float = 0.0
    """Of a private round: the standard deviation of the noise over `clip_norm`. 0: what `target_epsilon`
    takes."""
    target_epsilon: float = 0.0
    """Of all rounds of the run together; see `noise_multiplier`."""
    target_delta: float = 0.0
    """Beside `target_epsilon`."""
    private_steps: int = 0
    """The private steps that all rounds of the run will ask of the client."""
    secure_aggregation: bool = False
    """Whether the hub sees the update only in the sum over a group of clients; see `privacy.sum_request`."""

    @property
    def is_private(self) -> bool:
        """Whether the update tells little of any row; see `privacy`."""
        return self.clip_norm > 0

    @property
    def holds_gradients(self) -> bool:
        """Whether the gradients of all layers exist at once."""
        return self.gradient_accumulation_steps > 1 or self.max_grad_norm > 0 or self.is_private

    @property
    def packs(self) -> bool:
        """Whether rows share a sequence."""
        return self.packed_length > 0 or self.padding_free

    def largest_batch(self, max_length: int) -> int:
        """Return the most tokens that are computed at once, with padding, where no row is longer than this.

        Measured in tokens, a batch holds one sequence at least, also one that is longer than the batch. A
        private step goes through its rows one by one, or in batches that are clipped by norms.
        """
        longest = max(self.packed_length, max_length)
        if self.is_private:
            return max(longest, GHOST_TOKENS) if self.clipping == "ghost" else longest
        return max(self.tokens_per_step, longest) if self.tokens_per_step else self.batch_size * longest

    def most_tokens(self, steps: int, max_length: int) -> int:
        """Return the most tokens that so many steps can have, where no row is longer than this."""
        at_once = self.batch_size * max_length if self.is_private else self.largest_batch(max_length)
        return steps * self.gradient_accumulation_steps * at_once

    def longest_sequence(self, max_length: int) -> int:
        """Return the most tokens of a sequence, where no row is longer than this."""
        return self.largest_batch(max_length) if self.padding_free else max(self.packed_length, max_length)


@dataclass(frozen=True)
class ClientUpdate:
    """A client's answer to a plan: what it learned, and how many tokens each expert saw."""

    round: int
    client: int
    active_experts: int
    delta: Adapter
    rescaler_values: Tensor
    """[L] s per MoE layer after training."""
    counts: Tensor
    """[L,E] int64: non-padding tokens routed to each expert during training (c in the paper)."""
    tokens: int
    """Non-padding tokens trained on (T)."""
    num_examples: int
    """Rows that the client holds (|D|)."""
    trained_examples: int
    """Rows that it trained on in the round, each counted once."""
    steps: int
    """Optimizer steps taken."""
    loss: float | None
    """Mean loss of the response tokens over the round's steps, in nats per token. None: the client withholds
    it, and its counts say only which experts it used."""
    trainable: Trainable = "both"
    """The half that was trained; `delta` is zero in the other half."""
    sampling_rate: float = 0.0
    """Of a private round: the chance of a row, or of a person's rows, to be in a step."""
    noise_multiplier: float = 0.0
    """Of a private round: the standard deviation of the noise over the plan's `clip_norm`."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The server's request to one client: score the global model, as it deploys it, on rows of its own."""

    round: int
    """The round after which the model is scored; 0: before training."""
    client: int
    active_experts: int
    rescaler_values: Tensor
    """[L] s per MoE layer."""
    adapter: Adapter
    merged: Adapter = NOTHING
    """Factors of any rank, merged into the base; see `RoundPlan.merged`."""
    max_new_tokens: int = 0
    """The most tokens of an answer that is generated; 0: none is, and there is no score but the loss."""


@dataclass(frozen=True)
class ClientEvaluation:
    """A client's answer to an `EvaluationPlan`: sums over the rows that it holds to score, and no row."""

    round: int
    client: int
    active_experts: int
    rows: int
    response_tokens: int
    """Tokens that have a label, over all these rows."""
    loss_sum: float
    """Sum over these tokens, in nats."""
    exact_matches: int | None = None
    """Rows answered exactly; None if no answer was generated."""
    rouge_l_sum: float | None = None
    """Sum of the rows' ROUGE-L F-measures, each from 0 to 1; None if no answer was generated."""
