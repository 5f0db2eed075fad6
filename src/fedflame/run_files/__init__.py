"""The files of a run folder as every reader must see them: whole, or refused in one line. Needs no torch.

`lines` has the lines of metrics.jsonl, and `checkpoints` the names and seals of the checkpoints. The small
JSON files hold their checksums themselves; see `checked_json`.
"""

from __future__ import annotations

ADVICE = "put back a copy of the file, or start anew with --overwrite"
"""What to do where a file of a run folder cannot be used, and nothing else of the folder helps."""
LOCK = ".lock"
"""The file of a run folder by which a process is the only one that writes it; see `folder_lock`."""
