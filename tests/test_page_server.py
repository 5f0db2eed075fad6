"""One page for a browser of this machine: who gets it, and what it may do."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from fedflame.errors import UserError
from fedflame.page_server import PageServer

PAGE = "<!DOCTYPE html>\n<html><body><main>of today</main></body></html>\n"


class Pages:
    """What the server shows, and how often it asked."""

    def __init__(self) -> None:
        self.text, self.asked = PAGE, 0

    def __call__(self) -> str:
        self.asked += 1
        return self.text


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture
def server(pages: Pages) -> Iterator[PageServer]:
    with PageServer(pages) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: PageServer, path: str | None = None, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, server.path if path is None else path, headers=named)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return found


def test_the_page_comes_at_its_address_with_a_script_of_which_the_browser_knows_the_hash(
    server: PageServer,
) -> None:
    assert server.address == f"http://127.0.0.1:{server.server_port}{server.path}"
    status, headers, text = ask(server)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
    assert status == 200 and script and text.replace(script[0], "") == PAGE
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = headers["Content-Security-Policy"].split("; ")
    assert policy[0] == "default-src 'none'" and f"script-src 'sha256-{digest}'" in policy
    assert "frame-ancestors 'none'" in policy and headers["Cache-Control"] == "no-store"
    assert headers["Content-Type"] == "text/html; charset=utf-8" and "Python" not in headers["Server"]


def test_only_who_knows_the_path_and_calls_this_machine_by_its_name_gets_it(
    server: PageServer, pages: Pages
) -> None:
    for path in ("/", "/index.html", "/favicon.ico", server.path + "/", server.path[:-1]):
        assert ask(server, path)[0] == 404, path
    for method in ("HEAD", "POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(server, method=method)[0] == 501, method
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.", "[::1]"):
        status, _, text = ask(server, Host=host)
        assert status == 403 and "of today" not in text, host
    assert pages.asked == 0
    for host in ("localhost", "localhost:9000", "127.0.0.1", f"127.0.0.1:{server.server_port}"):
        assert ask(server, Host=host)[0] == 200, host


def test_a_path_is_drawn_anew_and_long_enough(server: PageServer) -> None:
    with PageServer(lambda: "") as other:
        assert other.path != server.path and len(other.path) > 20


def test_what_has_not_changed_is_not_sent_again(server: PageServer, pages: Pages) -> None:
    mark = ask(server)[1]["ETag"]
    status, _, text = ask(server, If_None_Match=mark)
    assert (status, text) == (304, "")
    pages.text = PAGE.replace("today", "tomorrow")
    status, headers, text = ask(server, If_None_Match=mark)
    assert status == 200 and "of tomorrow" in text and headers["ETag"] != mark


def test_nobody_else_on_the_network_reaches_it(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with socket.socket() as stranger:
        stranger.settimeout(5)
        assert stranger.connect_ex(("127.0.0.2", server.server_port)) != 0


def test_a_browser_that_goes_away_is_no_traceback(
    server: PageServer, pages: Pages, capsys: pytest.CaptureFixture[str]
) -> None:
    pages.text = PAGE.replace("of today", "x" * 20_000_000)
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(f"GET {server.path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        connection.recv(100)
    assert ask(server)[0] == 200
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_one_line(server: PageServer) -> None:
    with pytest.raises(UserError) as refused:
        PageServer(Pages(), server.server_port)
    line = f"port {server.server_port}: Address already in use; --port names another, 0 is a free one"
    assert str(refused.value) == line
