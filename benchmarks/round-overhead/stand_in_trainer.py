"""A trainer that answers at once: in the place of a site's own, it leaves of a round only what carries it.

Called with the socket, the site's name and the bytes of an update.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import cast

from fedflame.trainer.server import serve
from fedflame.trainer.service import TrainerService
from fedflame.trainer.unix_socket import listening
from fedflame.wire.envelope import Envelope


class StandIn:
    """Has its only update ready; random bytes, since those of a real one do not compress either."""

    def __init__(self, site: str, size: int) -> None:
        self._site, self._update = site, os.urandom(size)

    def answer(self, request: Envelope) -> Envelope:
        header = {"kind": "update", "site": self._site, "steps": 1, "tokens": 1}
        echoed = {name: request.header[name] for name in ("ticket", "run")}
        return Envelope(header | echoed, self._update)


if __name__ == "__main__":
    with listening(Path(sys.argv[1])) as listener:
        service = StandIn(sys.argv[2], int(sys.argv[3]))
        serve(listener, cast(TrainerService, service), lambda line: print(line, flush=True))
