"""The site's part of a run: whatever it is handed goes to the site's trainer, and its answer back.

Flower starts a process for every message, so nothing is held and little imported here. Where the trainer is,
and what the node calls itself, is the site's own business: its SuperNode's environment and node config.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedflame.engines.flower.payload import from_content, to_content, to_name
from fedflame.trainer.ask import PATIENCE_SECONDS, SOCKET_VARIABLE, answer_pieces

TRAINER_KEY, SITE_KEY = "trainer", "site"
"""Of the node config: the trainer's socket, and the name for a hub that does not know nodes by their keys."""
app = ClientApp()


@app.train()
def ask_trainer(message: Message, context: Context) -> Message:
    """Carry an envelope to the trainer. Raises RuntimeError where the node does not say who that is."""
    path = context.node_config.get(TRAINER_KEY) or os.environ.get(SOCKET_VARIABLE)
    if not path:
        raise RuntimeError(f"neither {SOCKET_VARIABLE} nor the node config's {TRAINER_KEY} names the trainer")
    answer = answer_pieces(Path(str(path)), [from_content(message.content)], PATIENCE_SECONDS)
    return Message(to_content(answer), reply_to=message)


@app.query()
def say_name(message: Message, context: Context) -> Message:
    """Answer with the site's name from the node config, or none."""
    return Message(to_name(str(context.node_config.get(SITE_KEY, ""))), reply_to=message)
