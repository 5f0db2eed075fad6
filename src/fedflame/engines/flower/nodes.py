"""Tell which Flower node belongs to which site.

With node authentication, a registered node has an id that the SuperLink lets no other node use. The hub's
file then maps sites to ids, and no name that a node gives itself counts. Without node authentication anyone
can join, and the hub believes the name that a node gives itself. Use that only on one machine, or in a
network that you trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedflame.engines.flower.payload import from_name

_QUERY_SECONDS = 60.0
"""Seconds in which a node must answer with its name; requests wait until then."""


class Nodes(Protocol):
    """Tells which node belongs to which site."""

    @property
    def asking(self) -> bool:
        """Whether some nodes have not yet answered the question for their name."""

    def reached(self, grid: Grid) -> dict[str, int]:
        """Return site -> node, for the nodes that are online now."""


class RegisteredNodes:
    """Identifies nodes by the ids in the hub's file."""

    asking = False

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids

    def reached(self, grid: Grid) -> dict[str, int]:
        """See `Nodes.reached`."""
        online = set(grid.get_node_ids())
        return {site: node for site, node in self._ids.items() if node in online}


class AskedNodes:
    """Asks each node once for its name. If two nodes give the same name, the one asked last counts."""

    def __init__(self, sites: Iterable[str]) -> None:
        self._sites = set(sites)
        self._names: dict[int, str] = {}
        """Node -> site, for every node that was asked; empty before its answer, or if that names no site."""
        self._open: dict[str, int] = {}
        """Id of the question -> node, for questions without an answer."""

    @property
    def asking(self) -> bool:
        """See `Nodes.asking`."""
        return bool(self._open)

    def reached(self, grid: Grid) -> dict[str, int]:
        """See `Nodes.reached`."""
        online = set(grid.get_node_ids())
        for node in sorted(online - self._names.keys()):
            self._names[node] = ""
            question = Message(RecordDict(), node, MessageType.QUERY, ttl=_QUERY_SECONDS)
            self._open |= dict.fromkeys(filter(None, grid.push_messages([question])), node)
        for answer in grid.pull_messages(set(self._open)) if self._open else ():
            node_asked = self._open.pop(answer.metadata.reply_to_message_id, None)
            if node_asked is not None and not answer.has_error():
                name = from_name(answer.content)
                self._names[node_asked] = name if name in self._sites else ""
        return {name: node for node, name in self._names.items() if name and node in online}


def nodes_of(sites: Iterable[str], ids: Mapping[str, int]) -> Nodes:
    """Return `RegisteredNodes` if there are ids, else `AskedNodes`."""
    return RegisteredNodes(ids) if ids else AskedNodes(sites)
