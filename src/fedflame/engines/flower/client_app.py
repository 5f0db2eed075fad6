"""The ClientApp at a site: it passes each request to the site's trainer, and returns the answer.

Flower starts a process for every message, so this app holds no state and imports little. The site's SuperNode
sets where the trainer is and how the node is named, in its environment and its node config.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedflame.engines.flower.payload import from_content, to_content, to_name
from fedflame.trainer.ask import PATIENCE_SECONDS, SOCKET_VARIABLE, answer_pieces

TRAINER_KEY, SITE_KEY = "trainer", "site"
"""Keys of the node config: the trainer's socket; the site's name, for hubs without node authentication."""
app = ClientApp()


@app.train()
def ask_trainer(message: Message, context: Context) -> Message:
    """Pass an envelope to the trainer. Raises RuntimeError if the node does not say where the trainer is."""
    path = context.node_config.get(TRAINER_KEY) or os.environ.get(SOCKET_VARIABLE)
    if not path:
        raise RuntimeError(f"neither {SOCKET_VARIABLE} nor the node config's {TRAINER_KEY} names the trainer")
    answer = answer_pieces(Path(str(path)), [from_content(message.content)], PATIENCE_SECONDS)
    return Message(to_content(answer), reply_to=message)


@app.query()
def say_name(message: Message, context: Context) -> Message:
    """Answer with the site's name from the node config; empty if it has none."""
    return Message(to_name(str(context.node_config.get(SITE_KEY, ""))), reply_to=message)
