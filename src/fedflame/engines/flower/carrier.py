"""Carry the messages of one job: requests from the driver to the nodes, and replies back."""

from __future__ import annotations

import queue
import time

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedflame.engines.flower.nodes import Nodes
from fedflame.engines.flower.payload import from_content, to_content
from fedflame.engines.link import HubLink
from fedflame.wire.envelope import Bytes

POLL_SECONDS = 0.5
"""Seconds between two polls of the SuperLink. Flower's `send_and_receive` takes 3 and waits for all nodes."""


class Carrier:
    """Carries messages until the driver closes its connection.

    A reply is identified by the message that it answers, not by its sender: errors come from the SuperLink.
    """

    def __init__(self, grid: Grid, link: HubLink, nodes: Nodes, ttl: float) -> None:
        """Prepare; nothing is sent yet.

        Args:
            grid: Flower's grid.
            link: the connection to the driver.
            nodes: tells which node belongs to which site.
            ttl: seconds after which the SuperLink may drop a message or its reply.
        """
        self._grid, self._link, self._nodes, self._ttl = grid, link, nodes, ttl
        self._open: dict[str, tuple[str, str]] = {}
        """Message id -> ticket and site, for messages without a reply."""
        self.reached: dict[str, int] = {}
        """Site -> node, for sites that were online at the last poll."""

    def run(self) -> None:
        """Carry until the driver closes. Raises OSError if the driver ends in the middle of a message."""
        requests = self._link.requests()
        self._look()
        while self._nodes.asking:  # wait for sites that have not yet answered with their name
            time.sleep(POLL_SECONDS)
            self._look()
        while True:
            self._look()
            try:
                request = requests.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if request is None:
                return
            self._carry(*request)

    def _look(self) -> None:
        """Poll the SuperLink: which sites are online, and which replies have come."""
        reached = self._nodes.reached(self._grid)
        if reached.keys() != self.reached.keys():
            self._link.sites(reached)
        self.reached = reached
        for reply in self._grid.pull_messages(set(self._open)) if self._open else ():
            asked = self._open.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:
                continue
            ticket, site = asked
            if reply.has_error():
                self._link.failed(ticket, site, _reason(reply))
            else:
                self._link.answered(ticket, site, from_content(reply.content))

    def _carry(self, ticket: str, site: str, request: Bytes) -> None:
        node = self.reached.get(site)
        if node is None:
            self._link.failed(ticket, site, "not connected")
            return
        message = Message(to_content([request]), node, MessageType.TRAIN, ttl=self._ttl)
        for sent in self._grid.push_messages([message]):
            if sent:
                self._open[sent] = (ticket, site)
            else:
                self._link.failed(ticket, site, "the SuperLink does not take messages to its node")


def _reason(reply: Message) -> str:
    """Return the first line of Flower's reason, with its error number."""
    words = (reply.error.reason or "").strip().splitlines() or ["no reason given"]
    return f"its engine says {words[0]} (error {reply.error.code})"
