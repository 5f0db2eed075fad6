"""Clients that falsify their answers: the attacks, and a wrapper around the clients of a run.

Hostile clients answer plans as the others do; their answers are falsified before the rounds see them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fedflame.clients.answers import Answer, Clients, OnStep
from fedflame.clients.local import LocalClients
from fedflame.data.encoding import EncodedRow
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.server.validation import believed, most_rows
from fedflame.training.reach import longest_way, trained_reach
from fedflame.wire.codec import decode_plan, decode_update, encode_update

Falsify = Callable[[ClientUpdate, RoundPlan], ClientUpdate]


def times(factor: float) -> Falsify:
    """The delta times a number."""

    def falsify(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        delta = update.delta.combine(update.delta, lambda value, _: factor * value)
        return replace(update, delta=delta)

    return falsify


def false_counts(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """Every token is said to have gone to the k experts that were used most; what others learned is zero."""
    used = update.counts.topk(plan.active_experts, dim=1).indices
    counts = torch.zeros_like(update.counts).scatter_(1, used, update.tokens)
    experts = {
        name: torch.where(
            (counts[int(name.split(".")[0])] > 0).view(-1, *[1] * (value.dim() - 1)), value, 0.0
        )
        for name, value in update.delta.experts.items()
    }
    return replace(update, counts=counts, delta=replace(update.delta, experts=experts))


def counts_and_flip(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    return times(-10.0)(false_counts(update, plan), plan)


def rescaler(s: float) -> Falsify:
    """A learned rescaler of this value in every layer."""

    def falsify(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
        if plan.rescaler == "fixed":
            return update
        return replace(update, rescaler_values=torch.full_like(update.rescaler_values, s))

    return falsify


def false_rows(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    return replace(update, num_examples=2**40, trained_examples=2**40)


def flip_at_the_bound(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    """Every value against the direction in which it should go, as far as AdamW could have moved it."""
    furthest = 0.99 * trained_reach(plan)
    return replace(
        update, delta=update.delta.combine(update.delta, lambda value, _: -furthest * value.sign())
    )


def rescaler_at_the_bound(update: ClientUpdate, plan: RoundPlan) -> ClientUpdate:
    if plan.rescaler != "learned":
        return update
    furthest = 0.99 * longest_way(plan)
    return replace(update, rescaler_values=plan.rescaler_values - furthest)


ATTACKS: dict[str, Falsify] = {
    "delta x 1e6": times(1e6),
    "sign-flip x 10": times(-10.0),
    "false counts, sign-flip x 10": counts_and_flip,
    "sign-flip at the bound": flip_at_the_bound,
    "rescaler at the bound": rescaler_at_the_bound,
    "rescaler 1e6": rescaler(1e6),
    "rescaler -1": rescaler(-1.0),
    "2^40 rows": false_rows,
    "NaN": times(float("nan")),
    "wrong labels": lambda update, plan: update,
}
LABELS = "wrong labels"
"""The client trains as told, on the responses of other rows."""
WITHIN = (LABELS, "sign-flip at the bound", "rescaler at the bound")
"""Attacks that go no further than AdamW can."""

REFUSED = ("2^40 rows", "NaN")
"""Answers that no round takes, whatever the defence."""


@dataclass(frozen=True)
class Liars:
    """The clients of a run, some of whose answers are falsified."""

    clients: LocalClients
    hostile: Sequence[int]
    attack: str

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        asked: deque[bytes] = deque()

        def noted() -> Iterator[tuple[int, bytes]]:
            for client, plan in plans:
                asked.append(plan)
                yield client, plan

        for answer in self._who_trains().train(noted(), on_step):
            yield self._falsified(answer, decode_plan(asked.popleft()))

    def evaluate(self, plans: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        return self.clients.evaluate(plans)

    def test_rows(self) -> Sequence[int | None]:
        return self.clients.test_rows()

    def num_examples(self) -> Sequence[int]:
        return self.clients.num_examples()

    def name(self, client: int) -> str:
        return self.clients.name(client)

    def believed_rows(self, client: int) -> int:
        return self.clients.believed_rows(client)

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        """What a hub believes of sites."""
        return believed(update, most_rows(self.num_examples()))

    def _who_trains(self) -> Clients:
        if self.attack != LABELS:
            return self.clients
        rows = list(self.clients.rows)
        for client in self.hostile:
            rows[client] = with_responses_of_others(rows[client])
        return replace(self.clients, rows=rows)

    def _falsified(self, answer: Answer, plan: RoundPlan) -> Answer:
        if plan.client not in self.hostile or not answer.update:
            return answer
        update = ATTACKS[self.attack](decode_update(answer.update, plan), plan)
        return replace(answer, update=encode_update(update, plan))


def with_responses_of_others(rows: Sequence[EncodedRow]) -> list[EncodedRow]:
    """Each prompt with the response of the row after the next."""
    others = [*rows[2:], *rows[:2]]
    return [
        replace(row, ids=row.ids[: row.prompt_length] + other.ids[other.prompt_length :])
        for row, other in zip(rows, others, strict=True)
    ]
