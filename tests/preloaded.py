"""`fedflame` as processes that start in milliseconds: forked from one process that has imported torch.

`Fork` starts a command and knows its process. `command_words` gives words to run instead of
`python -m fedflame`: this file then hands its streams over, passes signals on, and ends as the fork does. If
whoever asked for a fork is killed, the fork ends at once.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

LONGEST_REQUEST = 1 << 20


class Fork:
    """One command as a process, with what `subprocess.Popen` has of it."""

    def __init__(
        self, path: str, arguments: Sequence[str], environment: Mapping[str, str], streams: Sequence[int]
    ) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        request = json.dumps([list(arguments), dict(environment), os.getcwd()]).encode()
        socket.send_fds(self._connection, [request], list(streams))
        self._answer = b""
        while b"\n" not in self._answer:
            self._answer += self._connection.recv(64)
        self.pid = int(self._answer.partition(b"\n")[0])
        self._signal = signal.SIGKILL
        self.returncode: int | None = None
        """The exit code; negative for a signal."""

    def wait(self, timeout: float | None = None) -> int:
        self._connection.settimeout(timeout)
        while self.returncode is None:
            more = self._connection.recv(64)
            self._answer += more
            if not more:
                code = self._answer.partition(b"\n")[2]
                self.returncode = int(code) if code else -self._signal
                self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0.0)
        except BlockingIOError:
            return None

    def send_signal(self, number: signal.Signals) -> None:
        self._signal = number
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def fork_server() -> str:
    """The socket of the process that this one's forks come from."""
    path = Path(tempfile.mkdtemp(prefix="fedflame-")) / "forks.sock"
    quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(path)], stdin=subprocess.PIPE, env=quiet
    )
    atexit.register(server.communicate)
    atexit.register(server.kill)
    while not path.exists():
        assert server.poll() is None, "the process to fork from has ended"
        time.sleep(0.05)
    return str(path)


def command_words() -> tuple[str, ...]:
    """What to run instead of `python -m fedflame`."""
    return sys.executable, "-S", "-E", __file__, fork_server()


def _serve(path: str) -> NoReturn:
    gc.disable()  # so that importing takes less
    from fedflame.cli import app
    from fedflame.commands.run import print_run
    from fedflame.trainer.service import TrainerService

    assert app and print_run and TrainerService
    gc.freeze()
    gc.enable()
    threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks, so the system does
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        os.rename(f"{path}.new", path)
        while True:
            connection, _ = listener.accept()
            request, streams, _, _ = socket.recv_fds(connection, LONGEST_REQUEST, 3)
            if os.fork() == 0:
                listener.close()
                _be_the_command(connection, request, streams)
            connection.close()
            for stream in streams:
                os.close(stream)


def _be_the_command(connection: socket.socket, request: bytes, streams: list[int]) -> NoReturn:
    code = 1
    try:
        arguments, environment, folder = json.loads(request)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # A shell's background jobs ignore SIGINT, and their children inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        connection.sendall(f"{os.getpid()}\n".encode())
        threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
        code = _run(arguments, int(environment.get("OMP_NUM_THREADS", "1")))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(str(code).encode())
        os._exit(code)


def _run(arguments: list[str], threads: int) -> int:
    import torch

    from fedflame.cli import app

    torch.set_num_threads(threads)
    try:
        app(arguments, prog_name="fedflame")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _end_with(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)


def _hand_over(path: str, arguments: list[str]) -> int:
    fork = Fork(path, arguments, os.environ, [0, 1, 2])

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(fork.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return fork.wait()


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(sys.argv[2])
    sys.exit(abs(_hand_over(sys.argv[1], sys.argv[2:])))
