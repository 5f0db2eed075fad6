"""Clients of this machine whose updates are summed under masks, as sites' are; see `privacy.masks`.

One process holds all keys, so the masks hide nothing here. But the bytes of the run are those of a run over
sites, and every step of the protocol is taken.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedflame.clients.answers import Answer, Clients, OnStep
from fedflame.errors import UserError
from fedflame.messages import ClientUpdate
from fedflame.privacy.group_sums import masked_contribution
from fedflame.privacy.identity import public
from fedflame.privacy.ready import Ready
from fedflame.privacy.sum_request import SumRequest
from fedflame.wire.codec import decode_plan, decode_update


@dataclass
class MaskedClients:
    """The same clients; what they learned is told in sums alone."""

    inner: Clients
    folder: Path
    """Where a client's plan and its update wait, so that memory does not grow with the number of clients."""
    run: str = field(default_factory=lambda: secrets.token_hex(16))
    _keys: dict[int, X25519PrivateKey] = field(default_factory=dict)

    def train(self, plans: Iterable[tuple[int, bytes]], on_step: OnStep) -> Iterator[Answer]:
        asked: deque[tuple[int, bytes]] = deque()

        def noted() -> Iterator[tuple[int, bytes]]:
            for pair in plans:
                asked.append(pair)
                yield pair

        for answer in self.inner.train(noted(), on_step):
            client, plan = asked.popleft()
            yield answer if answer.failure else replace(answer, update=self._ready(client, plan, answer))

    def sums(self, requests: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        for client, message in requests:
            start = time.monotonic()
            vector = self._masked(client, SumRequest.decode(message))
            yield Answer(vector, "", time.monotonic() - start, len(message))

    def evaluate(self, plans: Iterable[tuple[int, bytes]]) -> Iterator[Answer]:
        return self.inner.evaluate(plans)

    def test_rows(self) -> Sequence[int | None]:
        return self.inner.test_rows()

    def num_examples(self) -> Sequence[int]:
        return self.inner.num_examples()

    def believed_rows(self, client: int) -> int:
        return self.inner.believed_rows(client)

    def believed(self, update: ClientUpdate) -> ClientUpdate:
        return self.inner.believed(update)

    def name(self, client: int) -> str:
        return self.inner.name(client)

    def _ready(self, client: int, plan: bytes, answer: Answer) -> bytes:
        try:
            self._path(client, "plan").write_bytes(plan)
            self._path(client, "update").write_bytes(answer.update)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot hold the updates of a round: {error.strerror}; make room, or set "
                "TMPDIR to a folder with more"
            ) from error
        key = self._keys.setdefault(client, X25519PrivateKey.generate())
        update = decode_update(answer.update, decode_plan(plan))
        return Ready.of(update, public(key)).encoded()

    def _masked(self, client: int, request: SumRequest) -> bytes:
        plan = decode_plan(self._path(client, "plan").read_bytes())
        update = decode_update(self._path(client, "update").read_bytes(), plan)
        own = self._keys[client]
        me = next(member for member in request.members if member.key == public(own))
        return masked_contribution(update, me, own, request)

    def _path(self, client: int, kind: str) -> Path:
        return self.folder / f"{client}.{kind}"
