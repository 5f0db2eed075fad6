"""An engine of threads, and trainers of this machine, for tests of what is between engine and trainer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedflame.engines.link import HubLink
from fedflame.trainer.ask import answer_pieces
from fedflame.trainer.server import serve
from fedflame.trainer.service import TrainerService
from fedflame.trainer.site import Site, load_site
from fedflame.trainer.unix_socket import listening

Deliver = Callable[[str, bytes], bytes]
"""From a site's name and a request to its answer."""


@dataclass
class ThreadEngine:
    """Carries each request on a thread of its own; `deliver` may misbehave."""

    deliver: Deliver
    reachable: set[str]
    jobs: dict[str, HubLink] = field(default_factory=dict)
    over: dict[str, str] = field(default_factory=dict)

    def submit(self, hub_socket: Path, job_key: str) -> str:
        job = f"job-{len(self.jobs) + 1}"
        link = self.jobs[job] = HubLink(hub_socket, job_key)
        threading.Thread(target=self._carry_all, args=(link, set(self.reachable)), daemon=True).start()
        return job

    def _carry_all(self, link: HubLink, sites: set[str]) -> None:
        with suppress(OSError):  # the driver has gone
            link.sites(sites)
        while (request := link.next_request()) is not None:
            threading.Thread(target=self._carry, args=(link, sites, *request), daemon=True).start()

    def _carry(self, link: HubLink, sites: set[str], ticket: str, site: str, content: bytes) -> None:
        with suppress(OSError):  # the driver has gone, or this job has been ended
            if site in sites and site in self.reachable:
                link.answered(ticket, site, self.deliver(site, content))
            else:
                link.failed(ticket, site, "not connected")

    def end(self, job: str, reason: str) -> None:
        """As a crash would."""
        self.over[job] = reason
        self.jobs[job].close()

    def ended(self, job: str) -> str | None:
        return self.over.get(job)

    def stop(self, job: str) -> None:
        self.over.setdefault(job, "stopped")
        self.jobs[job].close()

    def connected(self) -> set[str]:
        return set(self.reachable)


def write_site(
    folder: Path, name: str, data: Path, k: int, models: Mapping[str, str], more: str = ""
) -> Path:
    """A site's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    path.write_text(
        f'name = "{name}"\n{more}\n[data]\ndataset_name = "{data}"\n[trainer]\nactive_experts = {k}\n'
        "[models]\n" + "".join(f'"{known}" = "{place}"\n' for known, place in models.items())
    )
    return path


@contextmanager
def trainers(files: list[Path]) -> Iterator[dict[str, Site]]:
    """Trainers in threads of this process, at their sockets."""
    with ExitStack() as stack:
        sites = {}
        for path in files:
            site = load_site(path)
            service = TrainerService(site, lambda _: None)
            listener = stack.enter_context(listening(site.socket_path))
            threading.Thread(target=serve, args=(listener, service, lambda _: None), daemon=True).start()
            sites[site.name] = site
        yield sites


def asking(sites: Mapping[str, Site]) -> Deliver:
    return lambda name, request: b"".join(answer_pieces(sites[name].socket_path, [request], patience=5.0))
