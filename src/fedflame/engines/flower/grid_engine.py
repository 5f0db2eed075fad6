"""The engine for a ServerApp that runs the rounds itself: it uses the grid of the Flower run that it is in.

The driver, its socket and the carrier are then in one process.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from fedflame.engines.flower.carrier import Carrier
from fedflame.engines.flower.job import check_nodes, message_seconds
from fedflame.engines.flower.nodes import nodes_of
from fedflame.engines.hub import Hub
from fedflame.engines.link import HubLink

_END_SECONDS = 10.0


@dataclass(frozen=True)
class _Carried:
    link: HubLink
    carrier: Carrier
    thread: threading.Thread


class GridEngine:
    """Carries over the grid of this process. A job is a thread."""

    def __init__(self, grid: Grid, hub: Hub) -> None:
        """Take the grid that Flower passes to a ServerApp.

        Args:
            grid: Flower's grid.
            hub: the hub's file, of which the sites and nodes are used but not the SuperLink's address.

        Raises:
            UserError: the nodes in the file do not match its sites.
        """
        check_nodes(hub)
        self._grid, self._hub = grid, hub
        self._nodes = nodes_of(hub.site_names(), hub.flower.nodes)
        self._jobs: dict[str, _Carried] = {}

    def submit(self, hub_socket: Path, job_key: str) -> str:
        """See `Engine.submit`."""
        link = HubLink(hub_socket, job_key)
        carrier = Carrier(self._grid, link, self._nodes, message_seconds(self._hub))
        thread = threading.Thread(target=_carry, args=(carrier, link), daemon=True)
        self._jobs[job_key] = _Carried(link, carrier, thread)
        thread.start()
        return job_key

    def ended(self, job: str) -> str | None:
        """See `Engine.ended`. The thread prints its own error on stderr."""
        carried = self._jobs.get(job)
        if carried is None or carried.thread.is_alive():
            return None
        return "its connection to the SuperLink ended"

    def stop(self, job: str) -> None:
        """See `Engine.stop`."""
        carried = self._jobs.pop(job, None)
        if carried is not None:
            carried.link.close()
            carried.thread.join(_END_SECONDS)

    def connected(self) -> set[str] | None:
        """See `Engine.connected`; the sites that the current job reached at its last poll."""
        reached = [set(carried.carrier.reached) for carried in self._jobs.values()]
        return reached[-1] if reached else None


def _carry(carrier: Carrier, link: HubLink) -> None:
    try:
        with suppress(OSError):  # the driver has closed the connection while an answer was on its way
            carrier.run()
    finally:
        link.close()
