"""What each tracker has kept of a run, read from its own files."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Curves = dict[str, list[tuple[int, float]]]
"""Name -> step and value, in the order in which they are kept, duplicates too."""


def tensorboard_curves(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def trackio_curves(run: Path) -> Curves:
    from trackio.sqlite_storage import SQLiteStorage

    names = SQLiteStorage.get_runs("fedflame")
    assert [name.rpartition("-")[0] for name in names] == ["the-name"]
    curves: Curves = defaultdict(list)
    for line in SQLiteStorage.get_logs("fedflame", names[0]):
        for name, value in line.items():
            if name not in ("step", "timestamp"):
                curves[name].append((line["step"], value))
    return curves


def mlflow_curves(run: Path) -> Curves:
    from mlflow.tracking import MlflowClient

    store = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = store.get_experiment_by_name("fedflame")
    (found,) = store.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("the-name", "FINISHED")
    assert found.data.params["adapter.r"] == "3"
    names = found.data.metrics.keys() - {"round"}
    history = {name: store.get_metric_history(found.info.run_id, name) for name in names}
    return {name: [(one.step, one.value) for one in metrics] for name, metrics in history.items()}


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format after a header of 7 bytes."""
    at, block, record = 7, 32_768, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_curves(run: Path) -> Curves:
    from wandb.proto.wandb_internal_pb2 import Record

    curves: Curves = defaultdict(list)
    names = set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for content in wandb_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            names |= {record.run.run_id} - {""}
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    curves[name].append((items["_step"], value))
    assert len(names) == 1, "one run, however often it was resumed"
    return curves


READERS: dict[str, Callable[[Path], Curves]] = {
    "tensorboard": tensorboard_curves,
    "wandb": wandb_curves,
    "mlflow": mlflow_curves,
    "trackio": trackio_curves,
}


def needs(tracker: str) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed; pip install 'fedflame[{tracker}]'")
