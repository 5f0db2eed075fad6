"""The updates of a round: asked for, checked, clipped and remembered, in client order."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch.linalg import LinAlgError  # type: ignore[attr-defined] # not in its __all__

from fedflame.clients.answers import Answer
from fedflame.errors import InvalidMessage, UserError
from fedflame.messages import ClientUpdate, RoundPlan
from fedflame.run_files.spans import in_spans
from fedflame.server.client_lines import log_client
from fedflame.server.clipping import OUTLIER, Taken, clipped, outliers, remembered, taken
from fedflame.server.finite import Diverged, require_finite_state
from fedflame.server.parts import Server
from fedflame.server.plans import round_plan
from fedflame.server.private_rounds import expected_tokens, log_spent
from fedflame.server.sampling import training_clients
from fedflame.server.scoring import require_finite_losses
from fedflame.server.validation import validate_update
from fedflame.strategies.base import ClientProfile, ServerState
from fedflame.training.reach import require_within_reach, trained_reach
from fedflame.training.schedule import learning_rates
from fedflame.wire.codec import decode_update, encode_plan

_SPANS = 100
"""Of a round's steps in metrics.jsonl, so that a line stays short however many steps there are."""


@dataclass(frozen=True)
class Asked:
    """A plan that was sent and not yet answered."""

    profile: ClientProfile
    plan: RoundPlan
    plan_bytes: int


class Updates:
    """Iterates over a round's valid updates in client order, clipped, and remembers those that were used."""

    def __init__(self, server: Server, state: ServerState, round_number: int, alone: bool = False) -> None:
        """With `alone`, an update is left out that makes a state not finite without any other."""
        self._server, self._state, self._round, self.alone = server, state, round_number, alone
        self._reach = state.past.reach
        self._used: list[Taken] = []  # without the deltas

    @property
    def usable(self) -> int:
        """Return the number of updates that were used so far."""
        return len(self._used)

    @property
    def arrived(self) -> int:
        """Return the number of clients that count for `server.min_clients`."""
        return self.usable

    def aggregated(self) -> ServerState:
        """Return the state after the round."""
        state = _aggregate(self._server, self._state, self)
        past = remembered(self._state.past, [one.pace for one in self._used])
        return replace(state, past=replace(past, reach=self._reach))

    def warn_of_outliers(self) -> None:
        """Log and report the updates that went much further than the others."""
        for at, times in outliers([one.pace for one in self._used]).items():
            client = self._used[at].update.client
            name = self._server.clients.name(client)
            self._server.metrics.log("outlier", round=self._round, client=client, times=times, limit=OUTLIER)
            self._server.reporter.message(
                f"warning: round {self._round}: {name} went {times:.1f} times as far as the median client"
            )

    def __iter__(self) -> Iterator[ClientUpdate]:
        server = self._server
        rule = server.config.strategy.clip
        for one in clipped(self._accepted(), self._state.past, rule, server.run):
            if self.alone and (found := _not_finite_alone(server, self._state, one.update)):
                self._exclude(one.update.client, one.update.active_experts, f"by its update alone {found}")
                continue
            self._used.append(one.without_delta())
            if one.share < 1:
                self._log_clipped(one)
            yield server.clients.believed(one.update)

    def _accepted(self) -> Iterator[Taken]:
        for asked, answer in self._answers():
            one = self._accept(asked, answer)
            if one is not None:
                yield one

    def _answers(self) -> Iterator[tuple[Asked, Answer]]:
        """Have the round's clients train; yield each plan with its answer."""
        asked: deque[Asked] = deque()
        server = self._server
        for answer in server.clients.train(self._plans(asked), server.reporter.step):
            one = asked.popleft()
            server.reporter.end_client(server.clients.name(one.profile.client))
            yield one, answer

    def _plans(self, asked: deque[Asked]) -> Iterator[tuple[int, bytes]]:
        """Yield clients with their encoded plans, each made when it is needed, and add them to `asked`."""
        server = self._server
        for profile in training_clients(server.config, server.profiles, self._round):
            plan = round_plan(server, self._state, profile, self._round)
            buffer = encode_plan(plan)
            asked.append(Asked(profile, plan, len(buffer)))
            if plan.error_feedback:
                self._reach = max(self._reach, trained_reach(plan))
            name = server.clients.name(profile.client)
            server.reporter.start_client(self._round, name, plan.active_experts)
            yield profile.client, buffer

    def _accept(self, asked: Asked, answer: Answer) -> Taken | None:
        """Return the update in the answer, or None if it cannot be used; the reason is then logged."""
        server, profile, plan = self._server, asked.profile, asked.plan
        try:
            if answer.failure:
                raise InvalidMessage(answer.failure)
            update = decode_update(answer.update, plan)
            validate_update(update, plan, server.max_length)
            validate_rows(update.num_examples, profile)
            require_within_reach(update, plan, self._state.past.reach, server.adapted.num_experts_per_tok)
        except InvalidMessage as error:
            self._exclude(profile.client, plan.active_experts, str(error))
            return None
        bytes_down = asked.plan_bytes if answer.bytes_down is None else answer.bytes_down
        one = taken(update, plan)
        self._log(one, plan, bytes_down, answer)
        if plan.is_private:
            log_spent(server, plan, update.sampling_rate, update.noise_multiplier)
        return one

    def _exclude(self, client: int, k: int, reason: str) -> None:
        server = self._server
        server.metrics.log("excluded", round=self._round, client=client, active_experts=k, reason=reason)
        server.reporter.message(f"round {self._round}: {server.clients.name(client)} is left out: {reason}")

    def _log(self, one: Taken, plan: RoundPlan, bytes_down: int, answer: Answer) -> None:
        update, server, losses = one.update, self._server, answer.step_losses
        tokens = expected_tokens(server, plan) if plan.is_private else update.tokens
        told = {
            "loss": update.loss,
            "step_losses": in_spans(losses, _SPANS),
            "step_rates": in_spans(list(learning_rates(plan, update.steps)), _SPANS) if losses else [],
            "rescaler": update.rescaler_values.tolist(),
            "counts": [] if update.loss is None else update.counts.tolist(),
            "norms": dict(one.norms),
            "pace": one.pace.delta,
        }
        log_client(server, plan, update, tokens, answer.seconds, len(answer.update), bytes_down, told)
        loss = "withheld" if update.loss is None else f"{update.loss:.3f}"
        server.reporter.message(
            f"round {update.round}: {server.clients.name(update.client)} (k={plan.active_experts}) loss "
            f"{loss}, {'about ' * plan.is_private}{tokens:,} tokens, {tokens / answer.seconds:,.0f} tokens/s"
        )

    def _log_clipped(self, one: Taken) -> None:
        client = one.update.client
        self._server.metrics.log("clipped", round=self._round, client=client, share=one.share)
        self._server.reporter.message(
            f"round {self._round}: {self._server.clients.name(client)} went too far: {one.share:.0%} of its "
            "update is used"
        )


def _aggregate(server: Server, state: ServerState, updates: Iterable[ClientUpdate]) -> ServerState:
    try:
        return server.strategy.aggregate_train(state, iter(updates))
    except LinAlgError as error:  # a decomposition met a value that is not finite
        raise Diverged(f"the updates cannot be aggregated ({error})") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"the disk cannot hold the updates of a round: {error.strerror}") from error


def _not_finite_alone(server: Server, state: ServerState, update: ClientUpdate) -> str:
    """Return what is not finite after a round with this update alone; empty if everything is."""
    try:
        alone = _aggregate(server, state, [update])
        require_finite_state(alone)
        require_finite_losses(server, alone, server.held_out)
    except Diverged as error:
        return str(error)
    return ""


def validate_rows(claimed: int, profile: ClientProfile) -> None:
    """Raise InvalidMessage if a client claims other rows than before."""
    # |D| is a weight in the mean, so a client must not change it once it is known.
    if profile.num_examples and claimed != profile.num_examples:
        raise InvalidMessage(f"update claims {claimed} rows; the client has {profile.num_examples}")
