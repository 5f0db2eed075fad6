"""One page on the loopback interface, which the browser that shows it keeps up to date.

Other users of this machine could ask for it, and so could any site that the browser has open, by a name that
it lets point to 127.0.0.1. So the path of the page is a secret that is drawn when the server starts, and a
request must name the host as this machine's own.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import Lock
from typing import Any

from fedflame.errors import UserError

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
"""Of this machine. The port may be another one, where it is forwarded."""
_SECONDS = 10
"""How long a connection may say nothing."""
_RELOAD = """
let mark = null;
async function look() {
  try {
    const answer = await fetch(location.href, {headers: mark ? {"If-None-Match": mark} : {}});
    if (answer.status === 200) {
      mark = answer.headers.get("ETag");
      const title = summary => summary.textContent;
      const open = [...document.querySelectorAll("details[open] > summary")].map(title);
      const main = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
      for (const fold of main.querySelectorAll("details"))
        fold.open = open.includes(title(fold.querySelector("summary")));
      document.querySelector("main").replaceWith(main);
    }
    document.body.classList.remove("gone");
  } catch {
    document.body.classList.add("gone");
  }
  setTimeout(look, 2000);
}
setTimeout(look, 2000);
"""
"""Asks for the page again and puts it in place. What the reader has opened stays open."""
_HASH = base64.b64encode(hashlib.sha256(_RELOAD.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def remade(make: Callable[[], str], state: Callable[[], object]) -> Callable[[], str]:
    """Return what returns the last page again, unless `state` returns another value since. It raises too."""
    made: list[tuple[object, str]] = []

    def page() -> str:
        now = state()
        if not made or made[-1][0] != now:
            made[:] = [(now, make())]
        return made[-1][1]

    return page


def as_it_is(path: Path) -> tuple[int, int]:
    """Return when a file was changed last, and its size, as part of a state; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


class PageServer(ThreadingTCPServer):
    """Serves what `page` returns, at `address`, to GET; everything else is refused.

    `HTTPServer` would also ask for the name of the host, which a slow resolver makes long.
    """

    daemon_threads = allow_reuse_address = True

    def __init__(self, page: Callable[[], str], port: int = 0) -> None:
        """Listen at a port; 0: a free one.

        Raises:
            UserError: the port is taken or not allowed.
        """
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(
                f"port {port}: {error.strerror}; --port names another, 0 is a free one"
            ) from error
        self._page, self._making = page, Lock()
        self.path = f"/{secrets.token_urlsafe(16)}"

    @property
    def server_port(self) -> int:
        """The port that it listens at."""
        return int(self.socket.getsockname()[1])

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.server_port}{self.path}"

    def content(self) -> bytes:
        """Return the page as it is now; one request at a time makes it."""
        with self._making:
            html = self._page()
        return html.replace("</body>", f"<script>{_RELOAD}</script></body>").encode()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a browser that has gone away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = _SECONDS

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").rpartition(":")
        if (host[0] or host[2]) not in _NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "Not a name of this machine")
        elif not hmac.compare_digest(self.path.encode(), self.server.path.encode()):
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._send(self.server.content())

    def _send(self, content: bytes) -> None:
        mark = f'"{hashlib.sha256(content).hexdigest()}"'
        same = self.headers.get("If-None-Match") == mark
        self.send_response(HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("ETag", mark)
        if same:
            self.end_headers()
            return
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "fedflame"

    def log_message(self, format: str, *args: object) -> None:
        """Keep the console as it is."""
