"""The ServerApp on the hub: it carries messages between the driver's socket and Flower's grid."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedflame.engines.flower.carrier import Carrier
from fedflame.engines.flower.job import Assignment
from fedflame.engines.flower.nodes import nodes_of
from fedflame.engines.link import HubLink

app = ServerApp()


@app.main()
def carry(grid: Grid, context: Context) -> None:
    """Carry until the driver closes; Flower calls this once. Raises OSError if no driver is at the socket."""
    given = Assignment.from_run_config(context.run_config)
    link = HubLink(given.hub_socket, given.job_key)
    try:
        Carrier(grid, link, nodes_of(given.sites, given.nodes), given.message_seconds).run()
    finally:
        link.close()
