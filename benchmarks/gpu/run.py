"""Everything that is to be known of one card, in ten minutes.

    python benchmarks/gpu/run.py                          # on the first CUDA card
    python benchmarks/gpu/run.py --stages block,step      # some of the stages; what others found stays
    python benchmarks/gpu/run.py --small --output DIR     # the same program on a CPU, to see that it works
    python benchmarks/gpu/run.py --render                 # README.md from the results; nothing is measured

The results go to a JSON file with the name of the card after every stage, and those of the stage that runs to
another file after every row. A stage that fails or exceeds its budget is recorded, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import readme

from fedflame.atomic_file import write_atomically
from fedflame.json_text import to_text

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
PATIENCE = 10
"""A CPU may take so many times the budgets, which are those of a card."""
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "KINETO_LOG_LEVEL": "99",  # the profiler is silent
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", help="such as block,step; all unless given")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that the program works")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu with --small, else cuda, unless given")
    parser.add_argument("--data", type=Path, help="rows of instructions, for one more run of the last stage")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument(
        "--render", type=Path, nargs="?", const=README, help="write the tables to this file and stop"
    )
    arguments = parser.parse_args()
    if arguments.render:
        arguments.render.write_text(readme(arguments.output))
        return
    if arguments.small and arguments.output == RESULTS:
        parser.error("--small: give --output, since its figures are no results")
    device = arguments.device or ("cpu" if arguments.small else "cuda")
    os.environ.update(SETTINGS)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the stages end, too
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    measure(device, arguments.small, arguments.data, arguments.output, arguments.stages)


def measure(device: str, small: bool, data: Path | None, output: Path, names: str | None) -> None:
    from sizes import FULL, SMALL  # here, because torch and Triton read the environment when imported
    from stages import DEVICE, STAGES, in_turn

    sizes = replace(SMALL if small else FULL, device=device, data=data and data.resolve())
    wanted = names.split(",") if names else [name for name in STAGES if name != DEVICE]
    if unknown := ", ".join(sorted(set(wanted) - set(STAGES))):
        raise SystemExit(f"--stages {unknown}: must be of {', '.join(STAGES)}")
    spare, file, results = 0.0, output, dict[str, Any]()
    with closing(in_turn([DEVICE, *wanted], sizes)) as processes:
        for process in processes:
            partial = output / f"{process.name}.partial.json"
            budget = STAGES[process.name].budget * (1 if device == "cuda" else PATIENCE) + spare
            begun = time.monotonic()
            found = process.finish(partial, budget)
            found["seconds"] = time.monotonic() - begun
            spare = max(0.0, budget - found["seconds"])
            failures = map(in_a_line, found["failures"])
            print(f"{process.name}: {found['seconds']:.0f} s", *failures, sep="\n  ", flush=True)
            if process.name == DEVICE:
                if found["failures"]:
                    raise SystemExit("nothing is measured; --small runs on a CPU")
                file = output / f"{card(found['tables'][DEVICE][0])}.json"
                results = json.loads(file.read_text()) if file.exists() else {}
            write_atomically(file, to_text(results | {process.name: found}, indent=1).encode())
            results[process.name] = found
            partial.unlink()
    print(f"results: {file}")


def in_a_line(failure: dict[str, str]) -> str:
    return f"{failure['what']}: {failure['message']}".replace("\n", " ")[:300]


def card(facts: dict[str, Any]) -> str:
    """The name of the card as the name of a file."""
    return re.sub("[^a-z0-9]+", "-", facts.get("gpu", "cpu").lower()).strip("-")


if __name__ == "__main__":
    main()
