"""The server's part of a job of NVIDIA FLARE, without its processes: which sites it reaches, what travels."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nvflare")
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable

from fedflame.engines.nvflare import payload
from fedflame.engines.nvflare import relay as relay_module
from fedflame.engines.nvflare.relay import FedflameRelay
from fedflame.engines.nvflare.revoked import revoked_path, revoked_text


@dataclass
class Link:
    """Takes note of what the driver would be told."""

    failures: list[tuple[str, str, str]] = field(default_factory=list)

    def failed(self, ticket: str, site: str, reason: str) -> None:
        self.failures.append((ticket, site, reason))


@pytest.fixture
def relay(tmp_path: Path) -> FedflameRelay:
    made = FedflameRelay(str(tmp_path / "hub.sock"), "key")
    made._engine = SimpleNamespace(get_clients=lambda: [SimpleNamespace(name=name) for name in ("a", "b")])
    made.set_communicator(WFCommServer())
    return made


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_pieces_of_any_size_travel_as_arrays_of_at_most_one_size(pieces: list[bytes]) -> None:
    with patch.object(payload, "_LARGEST", 7):
        sent = payload.to_shareable(pieces)
    assert all(0 < len(array) <= 7 for array in sent["envelope"])
    assert b"".join(payload.from_shareable(sent)) == b"".join(pieces)


@pytest.mark.parametrize(
    "content", [None, b"bytes", np.zeros(3, np.uint8), [np.zeros(3)], [np.zeros((1, 2), np.uint8)]]
)
def test_what_is_no_list_of_byte_arrays_is_no_envelope(content: object) -> None:
    assert payload.from_shareable(Shareable({"envelope": content})) == []


def says_something(relay: FedflameRelay, site: str) -> None:
    """As nvflare tells it of a heartbeat or of a question for a task."""
    communicator: Any = relay.communicator
    communicator.client_is_active(site, "jobHeartbeat", FLContext())


def test_a_site_that_fell_silent_is_no_longer_reached_and_its_tickets_end(
    relay: FedflameRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "SILENT_SECONDS", 0.4)
    link: Any = Link()
    relay._link, relay._open = link, {"ticket-a": "a", "ticket-b": "b"}
    assert relay._reachable() == {"a", "b"}, "at the start nobody had the time to say something"
    time.sleep(0.5)
    says_something(relay, "a")
    assert relay._reachable() == {"a"}
    relay._give_up_on_the_dead(relay._reachable())
    assert link.failures == [("ticket-b", "b", "disconnected")]
    says_something(relay, "b")
    assert relay._reachable() == {"a", "b"}


def test_a_site_that_nvflare_misses_is_not_reached_until_it_is_heard_again(relay: FedflameRelay) -> None:
    communicator: Any = relay.communicator
    communicator.process_dead_client_report("b", FLContext())
    communicator._dead_clients["b"].disconnect_time = time.time()
    assert relay._reachable() == {"a"}
    says_something(relay, "b")
    assert relay._reachable() == {"a", "b"}


def begin(relay: FedflameRelay, kit: Path) -> None:
    """As nvflare begins a job in the server's kit; no driver listens."""
    context, panics = FLContext(), list[str]()
    workspace = SimpleNamespace(get_root_dir=lambda: str(kit))
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=False)
    with patch.object(relay, "system_panic", lambda reason, _: panics.append(reason)):
        relay.start_controller(context)
    assert "no fedflame driver" in panics[0]


def test_a_site_that_is_revoked_in_a_job_is_out_of_it_at_once(relay: FedflameRelay, tmp_path: Path) -> None:
    """nvflare itself lets a job that runs go on with a site that it no longer admits."""
    begin(relay, tmp_path)
    link: Any = Link()
    relay._link, relay._open = link, {"ticket-a": "a", "ticket-b": "b", "ticket-c": "b"}
    assert relay._reachable() == {"a", "b"}
    revoked_path(tmp_path).write_text(revoked_text(frozenset({"b"})))
    result = SimpleNamespace(get_return_code=lambda: ReturnCode.OK)
    task = SimpleNamespace(result=result, client=SimpleNamespace(name="b"))
    relay._received("ticket-b", client_task=task, fl_ctx=FLContext())  # type: ignore[arg-type]
    why = "revoked by the hub's administrator"
    assert link.failures == [("ticket-b", "b", why)], "what it sends is used no longer"
    assert relay._reachable() == {"a"}
    relay._give_up_on_the_dead(relay._reachable())
    assert link.failures[1:] == [("ticket-c", "b", why)]


def test_a_job_removes_what_old_jobs_left_in_the_servers_kit(relay: FedflameRelay, tmp_path: Path) -> None:
    with patch.object(relay_module, "prune_kit") as prune:
        begin(relay, tmp_path)
    prune.assert_called_once_with(tmp_path)
