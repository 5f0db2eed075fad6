"""The updates of a round of which the hub sees sums alone: one over every group of clients with equal k.

All clients are asked to train. Those that are ready by the end form the groups, which are fixed then: a
member masks its update once, for one list of members. Every group's sum counts as the update of one client
that has the rows of all its members. A group of fewer than `privacy.min_group` is left out, and so is one of
which a member gives no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from fedflame.clients.answers import Answer, SummingClients
from fedflame.errors import InvalidMessage
from fedflame.messages import NOTHING, ClientUpdate, RoundPlan
from fedflame.privacy.group_sums import group_update, length_of_sum
from fedflame.privacy.ready import Ready
from fedflame.privacy.sum_request import Member, SumRequest, given_digest
from fedflame.server.client_lines import log_client
from fedflame.server.parts import Server
from fedflame.server.private_rounds import expected_tokens, log_spent
from fedflame.server.updates import Asked, Updates, validate_rows


@dataclass(frozen=True)
class _Trained:
    """A client that has trained, and what it said."""

    asked: Asked
    ready: Ready
    answer: Answer

    @property
    def client(self) -> int:
        return self.asked.profile.client


class MaskedUpdates(Updates):
    """Iterates over the sums of a round's groups, in the order of their first clients."""

    _listed, _members = 0, 0

    @property
    def usable(self) -> int:
        """Return the number of clients whose updates are in a sum that was used."""
        return self._members

    @property
    def arrived(self) -> int:
        """Return the number of clients that were asked for a sum.

        If one of them is lost then, the round changes nothing for its group. To ask the others for another
        sum would show what they had added to the first.
        """
        return self._listed

    def __iter__(self) -> Iterator[ClientUpdate]:
        groups = self._groups()
        requests = [self._request(group) for group in groups]
        messages = [request.encoded() for request in requests]
        asked = [
            (one.client, message) for group, message in zip(groups, messages, strict=True) for one in group
        ]
        answers = cast(SummingClients, self._server.clients).sums(asked)
        self._listed = len(asked)
        for group, request in zip(groups, requests, strict=True):
            try:
                update = self._sum(group, request, answers)
            except InvalidMessage as error:
                for one in group:
                    self._exclude(one.client, request.active_experts, f"its group has no sum: {error}")
                continue
            self._members += len(group)
            yield update

    def _groups(self) -> list[list[_Trained]]:
        """Have all clients train; return the groups of those that are ready, in the order of their first.

        All of a group have trained by the same plan.
        """
        groups: dict[str, list[_Trained]] = {}
        for asked, answer in self._answers():
            one = self._accepted_ready(asked, answer)
            if one is not None:
                groups.setdefault(given_digest(one.asked.plan), []).append(one)
        least, large = self._server.config.privacy.min_group, []
        for group in groups.values():
            if len(group) >= least:
                large.append(group)
                continue
            k = group[0].asked.plan.active_experts
            for one in group:
                reason = f"{len(group)} clients with k = {k} are ready; privacy.min_group = {least}"
                self._exclude(one.client, k, reason)
        return sorted(large, key=lambda group: group[0].client)

    def _accepted_ready(self, asked: Asked, answer: Answer) -> _Trained | None:
        server, profile, plan = self._server, asked.profile, asked.plan
        try:
            if answer.failure:
                raise InvalidMessage(answer.failure)
            ready = Ready.decode(answer.update, plan)
            validate_rows(ready.num_examples, profile)
        except InvalidMessage as error:
            self._exclude(profile.client, plan.active_experts, str(error))
            return None
        if plan.is_private:
            log_spent(server, plan, ready.sampling_rate, ready.noise_multiplier)
        return _Trained(asked, ready, answer)

    def _request(self, group: Sequence[_Trained]) -> SumRequest:
        server, plan = self._server, group[0].asked.plan
        return SumRequest(
            run=cast(SummingClients, server.clients).run,
            round=self._round,
            active_experts=plan.active_experts,
            given=given_digest(plan),
            temperature=self._temperature(),
            members=sorted((self._member(one) for one in group), key=lambda member: member.name),
        )

    def _temperature(self) -> float:
        """The exponent of activation frequencies; 0 for a method whose weights do not depend on them."""
        config = self._server.config
        return config.strategy.temperature if "temperature" in config.method.options else 0.0

    def _member(self, one: _Trained) -> Member:
        server, ready = self._server, one.ready
        held = server.config.strategy.counted_rows == "held"
        rows = ready.num_examples if held else ready.trained_examples
        name = server.clients.name(one.client)
        return Member(name=name, rows=rows, key=ready.key, signature=ready.signature)

    def _sum(self, group: Sequence[_Trained], request: SumRequest, answers: Iterator[Answer]) -> ClientUpdate:
        """Take an answer for each member; return the update of the group. One answer is in memory at a time.

        Raises:
            InvalidMessage: a member gave no answer, or the masks have not cancelled.
        """
        plan, problem, sent = group[0].asked.plan, "", []
        total = np.zeros(length_of_sum(plan, request), np.uint32)
        for one, answer in zip(group, answers, strict=False):
            name, size = self._server.clients.name(one.client), len(answer.update)
            if answer.failure:
                problem = problem or f"{name}: {answer.failure}"
            elif size != total.nbytes:
                problem = problem or f"{name}: {size:,} bytes; a sum has {total.nbytes:,}"
            else:
                total += np.frombuffer(answer.update, "<u4")
            sent.append((size, answer.bytes_down or 0))
        if problem:
            raise InvalidMessage(problem)
        update = group_update(total, request, _without_values(group, plan), plan)
        for one, (up, down) in zip(group, sent, strict=True):
            _log(self._server, one, up, down)
        return update


def _without_values(group: Sequence[_Trained], plan: RoundPlan) -> ClientUpdate:
    """Return an update for the group, whose values and rows are still to come."""
    return ClientUpdate(
        round=plan.round,
        client=group[0].client,
        active_experts=plan.active_experts,
        delta=NOTHING,
        rescaler_values=plan.rescaler_values,
        counts=plan.rescaler_values.new_empty(0),
        tokens=0,
        num_examples=0,
        trained_examples=0,
        steps=max(one.ready.steps for one in group),
        loss=None,
        trainable=plan.trainable,
    )


def _log(server: Server, one: _Trained, up: int, down: int) -> None:
    """Log what is known of a client whose update is in a sum, for which so many bytes went up and down."""
    plan, trained = one.asked.plan, one.answer
    up += len(trained.update)
    down += one.asked.plan_bytes if trained.bytes_down is None else trained.bytes_down
    log_client(server, plan, one.ready, expected_tokens(server, plan), trained.seconds, up, down)
    server.reporter.message(
        f"round {plan.round}: {server.clients.name(one.client)} (k={plan.active_experts}) is in a masked sum"
    )
