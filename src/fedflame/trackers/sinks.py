"""The trackers, each as thin as it can be. A package is imported when its tracker is opened.

Addresses and credentials come from the trackers' own environment variables. Whatever a tracker raises ends
its process and not the run; see `process`.
"""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedflame.config.words import Tracker

PROJECT = "fedflame"
"""What the runs stand under in a tracker, unless its environment variable names another."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told when it is opened."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    """The flat configuration, such as `{"adapter.r": 8}`."""
    id: str
    """The tracker's own name of this run; empty where the tracker has not seen it yet."""
    first_round: int
    """The first round that the tracker was not sent."""
    steps: int
    """Optimizer steps of a round: round n ends at step n * `steps` of the trackers' axis."""


ByStep = Mapping[int, Mapping[str, float]]


class Sink(Protocol):
    """An open tracker."""

    id: str
    """The tracker's own name of the run, by which a resumed run goes on in it."""
    first_round: int
    """The first round that the tracker does not have."""

    def log(self, by_step: ByStep) -> None:
        """Send the numbers of a round: step -> name -> value, in the order of the steps."""

    def close(self, finished: bool) -> None:
        """Send what is left, and say whether the run reached its last round."""


class TensorBoard:
    """Event files in the run folder's `tensorboard`."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self.id, self.first_round = "", run.first_round
        folder = run.folder / "tensorboard"
        _wait_for_a_later_name(folder)
        self._writer = EventFileWriter(str(folder))
        # A reader drops what earlier files have of this round and later ones: a round counts once.
        again = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        first = max(0, (run.first_round - 1) * run.steps + 1)
        self._writer.add_event(self._event(step=first, wall_time=time.time(), session_log=again))

    def log(self, by_step: ByStep) -> None:
        for step, metrics in by_step.items():
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            summary = self._summary(value=values)
            self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until a file that is begun now follows those that are there by its name, as a reader takes them.

    The name begins with the second and, in the same second, goes on with the process id.
    """
    names, process = [path.name for path in folder.glob("events.*")], f"{socket.gethostname()}.{os.getpid()}."
    for _ in range(20):  # not for ever: the clock may have been set back
        if all(name < f"events.out.tfevents.{int(time.time()):010d}.{process}" for name in names):
            return
        time.sleep(0.1)


class WandB:
    """Weights & Biases. Its files lie in the run folder, unless `WANDB_DIR` names another."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        # Nothing of the machine or of the code around the run is collected.
        settings = wandb.Settings(
            console="off", silent=True, disable_code=True, disable_git=True,
            x_disable_meta=True, x_disable_stats=True, x_save_requirements=False,
        )  # fmt: skip
        self.id = run.id or uuid.uuid4().hex
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=self.id,
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.config),
            settings=settings,
        )
        self.first_round = max(run.first_round, math.ceil(self._run.step / run.steps))

    def log(self, by_step: ByStep) -> None:
        for step, metrics in by_step.items():
            self._run.log(dict(metrics), step=step, commit=True)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """MLflow at `MLFLOW_TRACKING_URI`, by default a file of the working folder."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        self.id, self.first_round = run.id or self._create(run), run.first_round
        if run.id:
            # The store says which rounds it has: what was sent before a kill may not be noted.
            has = self._client.get_run(run.id).data.metrics.get("round", -1)
            self.first_round = max(run.first_round, int(has) + 1)
            self._client.update_run(run.id, status="RUNNING")
            return
        items = [Param(key, str(value)[:500]) for key, value in run.config.items()]
        for start in range(0, len(items), 100):  # the most that a server takes at a time
            self._client.log_batch(self.id, params=items[start : start + 100])

    def _create(self, run: TrackedRun) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        return str(self._client.create_run(experiment, run_name=run.name).info.run_id)

    def log(self, by_step: ByStep) -> None:
        now = int(1000 * time.time())
        batch = [
            self._metric(name, value, now, step)
            for step, metrics in by_step.items()
            for name, value in metrics.items()
        ]
        for start in range(0, len(batch), 1000):  # the most that a server takes at a time
            self._client.log_batch(self.id, metrics=batch[start : start + 1000])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Trackio:
    """trackio, local unless `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` says where."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        # trackio finds a run by its name, which therefore must be no other's.
        self.id, self.first_round = run.id or f"{run.name}-{uuid.uuid4().hex[:6]}", run.first_round
        self._run = trackio.init(
            project=PROJECT,
            name=self.id,
            resume="allow",
            config=dict(run.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, by_step: ByStep) -> None:
        for step, metrics in by_step.items():
            self._run.log(dict(metrics), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish()


SINKS: Mapping[Tracker, Callable[[TrackedRun], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
