"""Trackers of experiments as sinks of a run's events: TensorBoard, W&B, MLflow and trackio.

Each tracker is a process of its own, `follow`, which reads the rounds that the run folder keeps. So nothing
of a tracker runs in the process of the run: no import, no thread, no wait for a network. `process` starts and
ends them. `sinks` has the trackers themselves, and `metrics` what they are told.
"""

from __future__ import annotations
