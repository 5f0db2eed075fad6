"""Which node is which site.

A node that was registered with a key has an id that the SuperLink lets nobody else use, so the hub's file
maps sites to ids, and nothing that a node says of itself counts. Without node authentication anyone may join,
and the nodes' own word is taken: for one machine, or a network whose every member is trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedflame.engines.flower.payload import from_name

_QUERY_SECONDS = 60.0
"""For which a node may think about its name; requests wait meanwhile."""


class Nodes(Protocol):
    """Tells which node is which site."""

    @property
    def asking(self) -> bool:
        """Whether some have been asked who they are and have not answered yet."""

    def reached(self, grid: Grid) -> dict[str, int]:
        """Site -> node, of those that are online now."""


class RegisteredNodes:
    """Known by the ids that the hub's file has."""

    asking = False

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids

    def reached(self, grid: Grid) -> dict[str, int]:
        """See `Nodes.reached`."""
        online = set(grid.get_node_ids())
        return {site: node for site, node in self._ids.items() if node in online}


class AskedNodes:
    """Known by what they say, each asked once; of two with one name, the one that was asked last."""

    def __init__(self, sites: Iterable[str]) -> None:
        self._sites = set(sites)
        self._names: dict[int, str] = {}
        """Of every node that was asked; empty until it has answered, and where that is no name of a site."""
        self._open: dict[str, int] = {}
        """Question -> node."""

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
    """By their ids, or where there are none by what they say."""
    return RegisteredNodes(ids) if ids else AskedNodes(sites)
