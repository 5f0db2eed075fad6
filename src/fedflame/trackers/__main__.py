"""`python -m fedflame.trackers TRACKER RUN NAME`: the process that `process.reporting` starts."""

from __future__ import annotations

import sys
from pathlib import Path

from fedflame.trackers.follow import follow

if __name__ == "__main__":
    tracker, run, name = sys.argv[1:]
    sys.exit(follow(tracker, Path(run), name))
