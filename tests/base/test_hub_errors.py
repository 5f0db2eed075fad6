"""Why a model cannot be had from the hub: the reason is the one that the hub, or the way to it, gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from fedflame.base import files
from fedflame.base.files import load_error, model_config_path, tokenizer_error
from fedflame.errors import UserError

END = "; use 'olmoe-tiny', a folder, or a hub id"


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated model, for too many requests, and for an unknown id."""

    def do_GET(self) -> None:
        if "gated" in self.path and "/api/" in self.path:
            known = {"id": "lab/gated", "gated": "manual", "private": False, "sha": "0" * 40, "siblings": []}
            self._say(200, {}, json.dumps(known).encode())
        elif "gated" in self.path:
            self._say(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif "busy" in self.path:
            self._say(429, {"X-Error-Message": "Too many requests"})
        elif "broken" in self.path:
            self._say(500, {"X-Error-Message": "down\x1b[31m\nfor now"})
        else:
            self._say(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})

    do_HEAD = do_GET

    def _say(self, status: int, headers: dict[str, str], body: bytes = b"{}") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.replace("\n", " "))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    files.hub_refusal.cache_clear()
    yield
    files.hub_refusal.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lab/gated", "it is gated; ask for access on its page at the hub, and set HF_TOKEN"),
        ("lab/busy", "the hub answers 429, too many requests; wait, or set HF_TOKEN"),
        ("lab/unknown", "no such id, or a private one that needs HF_TOKEN"),
        ("no id at all", "no such id, or a private one that needs HF_TOKEN"),
    ],
)
def test_the_hubs_reason_is_told(name: str, reason: str) -> None:
    with pytest.raises(UserError) as refused:
        model_config_path(name)
    start = f"model {name!r}: no such folder, and not loadable from the hub: "
    assert str(refused.value) == f"{start}{reason}{END}"


@pytest.mark.usefixtures("hub")
def test_another_answer_is_told_in_a_line_that_can_be_printed() -> None:
    with pytest.raises(UserError, match=r"from the hub: the hub cannot be reached \(.*500") as refused:
        model_config_path("lab/broken")
    assert str(refused.value).isprintable()


def test_a_hub_that_nobody_answers_for_is_told_with_the_librarys_reason(
    hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub cannot be reached \(.*[Rr]efused"):
        model_config_path("lab/some")


def test_offline_the_reason_is_the_variable(monkeypatch: pytest.MonkeyPatch, hub: None) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and it is not in the cache"):
        model_config_path("lab/some")


def test_a_sentencepiece_file_alone_needs_its_package(tmp_path: Path) -> None:
    error = ImportError("tiktoken is required\nmore")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert tokenizer_error("m", tmp_path, error) == (
        "model m: its tokenizer.model cannot be read (tiktoken is required); pip install sentencepiece "
        "protobuf, or put a tokenizer.json beside it"
    )
    (tmp_path / "tokenizer.json").write_text("{")
    assert tokenizer_error(str(tmp_path), tmp_path, error) == load_error(str(tmp_path), error)
