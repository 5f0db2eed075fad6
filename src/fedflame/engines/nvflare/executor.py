"""The executor at a site: it passes each request to the site's trainer, and returns the answer."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedflame.engines.nvflare.job_folders import prune_kit
from fedflame.engines.nvflare.payload import TASK, from_shareable, to_shareable
from fedflame.trainer.ask import PATIENCE_SECONDS, SOCKET_VARIABLE, answer_pieces


class FedflameExecutor(Executor):  # type: ignore[misc] # nvflare ships no types
    """Passes requests to the trainer. It holds no state, because the trainer outlives this process."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Remove what old jobs have left in the site's kit, when a job begins."""
        if event_type == EventType.START_RUN:
            with suppress(OSError):  # it is no reason to end a job
                prune_kit(Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()))

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Ask the trainer; return TASK_UNKNOWN for any task but ours."""
        path = os.environ.get(SOCKET_VARIABLE)
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        if not path:
            self.log_error(fl_ctx, f"{SOCKET_VARIABLE} is not set; it names the trainer's socket")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return to_shareable(answer_pieces(Path(path), from_shareable(shareable), PATIENCE_SECONDS))
