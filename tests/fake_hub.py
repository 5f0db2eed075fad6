"""A hub on loopback that takes a push: repositories are made, and a commit leaves its files in a folder."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MAY_WRITE = "hf_writes"
"""The token that may write to alice's repositories; `hf_reads` may not, and any other is not known."""


@dataclass
class FakeHub:
    """What was asked of it."""

    folder: Path
    """Gets a folder for each repository."""
    address: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """Serve a hub within the block."""
    hub = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token != MAY_WRITE:
                self._answer(403 if token == "hf_reads" else 401, {"error": "not allowed"})
            elif self.path == "/api/repos/create":
                hub.created.append(json.loads(body))
                self._answer(200, {"url": f"{hub.address}/alice/{hub.created[-1]['name']}"})
            elif self.path == "/api/validate-yaml":
                known = b"license: nonsense" not in body
                errors = [] if known else [{"message": '"license" must be one of ours'}]
                self._answer(200 if known else 400, {"errors": errors, "warnings": []})
            elif self.path.endswith("/preupload/main"):
                files = [
                    {"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]
                ]
                self._answer(200, {"files": [file | {"shouldIgnore": False} for file in files]})
            elif self.path.endswith("/commit/main"):
                self._commit(body)
            else:
                self._answer(404, {"error": f"no {self.path}"})

        def _commit(self, body: bytes) -> None:
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = hub.folder / name / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            commit = {"commitUrl": f"{hub.address}/{name}/commit/0", "commitOid": "0" * 40}
            self._answer(200, commit | {"success": True})

        def do_GET(self) -> None:
            self._answer(404, {"error": f"no {self.path}"})

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
