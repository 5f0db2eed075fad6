"""The controller on the hub: it carries requests from the driver to the sites, and answers back."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedflame.engines.link import HubLink
from fedflame.engines.nvflare.job_folders import prune_kit
from fedflame.engines.nvflare.payload import TASK, from_shareable, to_shareable
from fedflame.engines.nvflare.revoked import revoked_names
from fedflame.wire.envelope import Bytes

_POLL_SECONDS = 0.1
_REVOKED = "revoked by the hub's administrator"
SILENT_SECONDS = 60.0
"""A site whose job process is silent for this long counts as gone; heartbeats come every 10 seconds.

nvflare itself reports a site as gone only while the site's parent process is away. The parent may be back
within a second, but without the job process."""


class FedflameRelay(Controller):  # type: ignore[misc] # nvflare ships no types
    """Carries messages until the driver closes its connection or the job is aborted."""

    def __init__(self, hub_socket: str, job_key: str) -> None:
        """Take the arguments from the job's configuration.

        Args:
            hub_socket: path of the driver's socket.
            job_key: the random key that the driver gave this job.
        """
        super().__init__(task_check_period=_POLL_SECONDS)
        self._hub_socket, self._job_key = Path(hub_socket), job_key
        self._link: HubLink | None = None
        self._open: dict[str, str] = {}
        """Ticket -> site, for requests without an answer."""
        self._lock = threading.Lock()
        self._heard: dict[str, float] = {}
        """Site -> time of the last message of its job process, in seconds of the monotonic clock."""
        self._begun = time.monotonic()
        self._kit = Path()
        """The server's kit."""

    def set_communicator(self, communicator: Any) -> None:
        """Record the time of every heartbeat that the communicator reports."""
        super().set_communicator(communicator)
        told = communicator.client_is_active

        def heard(client_name: str, reason: str, fl_ctx: FLContext) -> None:
            self._heard[client_name] = time.monotonic()
            told(client_name, reason, fl_ctx)

        communicator.client_is_active = heard

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Connect to the driver; end the job if there is none. Remove what old jobs have left in the kit."""
        self._kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir())
        with suppress(OSError):  # it is no reason to end a job
            prune_kit(self._kit)
        try:
            self._link = HubLink(self._hub_socket, self._job_key)
        except OSError as error:
            self.system_panic(f"no fedflame driver at {self._hub_socket}: {error}", fl_ctx)
            return

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Carry until the driver closes its connection or the job is aborted."""
        if self._link is None:
            return
        requests, reached = self._link.requests(), set[str]()
        while not abort_signal.triggered:
            sites = self._reachable()
            if sites != reached:
                self._link.sites(sites)
                reached = sites
            self._give_up_on_the_dead(sites)
            try:
                request = requests.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if request is None:
                return
            self._carry(*request, fl_ctx)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Cancel all tasks and close the connection."""
        self.cancel_all_tasks(fl_ctx=fl_ctx)
        if self._link is not None:
            self._link.close()

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Drop a late answer, for which the driver no longer waits."""
        self.log_warning(fl_ctx, f"late answer of {client.name} is dropped")

    def _reachable(self) -> set[str]:
        names = {client.name for client in self._engine.get_clients()} - revoked_names(self._kit)
        since = time.monotonic() - SILENT_SECONDS
        return {
            name
            for name in names
            if self._heard.get(name, self._begun) > since and self.get_client_disconnect_time(name) is None
        }

    def _carry(self, ticket: str, site: str, request: Bytes, fl_ctx: FLContext) -> None:
        with self._lock:
            self._open[ticket] = site
        if site not in self._reachable():
            self._fail(ticket, "not connected")
            return
        task = Task(
            name=TASK,
            data=to_shareable([request]),
            result_received_cb=partial(self._received, ticket),
            task_done_cb=partial(self._done, ticket),
        )
        self.send(task=task, fl_ctx=fl_ctx, targets=[site])

    def _received(self, ticket: str, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Return an answer to the driver. nvflare passes `client_task` and `fl_ctx` by name."""
        result, site = client_task.result, client_task.client.name
        client_task.result = None
        if result.get_return_code() != ReturnCode.OK:
            self._fail(ticket, f"its engine says {result.get_return_code()}")
            return
        if site in revoked_names(self._kit):
            self._fail(ticket, _REVOKED)
            return
        if self._settle(ticket) and self._link is not None:
            self._link.answered(ticket, site, *from_shareable(result))

    def _done(self, ticket: str, task: Task, fl_ctx: FLContext) -> None:
        self._fail(ticket, f"its task ended: {task.completion_status}")

    def _give_up_on_the_dead(self, reachable: set[str]) -> None:
        with self._lock:
            dead = [(ticket, site) for ticket, site in self._open.items() if site not in reachable]
        for ticket, site in dead:
            self._fail(ticket, _REVOKED if site in revoked_names(self._kit) else "disconnected")

    def _fail(self, ticket: str, reason: str) -> None:
        site = self._settle(ticket)
        if site and self._link is not None:
            self._link.failed(ticket, site, reason)

    def _settle(self, ticket: str) -> str | None:
        """Close the ticket; return its site, or None if it was not open."""
        with self._lock:
            return self._open.pop(ticket, None)
