"""Kill processes of a federation at random instants, and hold what comes out to an undisturbed run.

    python benchmarks/faults/run.py --kills 20 --output benchmarks/faults/results/nvflare.json
    python benchmarks/faults/run.py --engine flower --kills 5 --output benchmarks/faults/results/flower.json

A hub and three sites on loopback, as in examples/loopback.py or examples/loopback_flower.py, run a small
experiment again and again; in each run one process is killed (SIGKILL) at a random instant of the time that
an undisturbed run takes. Of Flower, the site's parent is its SuperNode and its job the ClientApp of one
message, the server's parent is the SuperLink, with its state in a file, and its job the run's ServerApp.
Every service is started again as systemd would, and a hub's driver by `--resume`. A run must end by itself,
leave no process behind, and give the bytes of a run in one process; where a site was left out of a round,
it must say so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from fedflame.experiment.environment import environment
from loopback import FEDFLAME, SITES, Federate, Loopback, descendants, fedflame, loopback, must
from loopback_flower import loopback_flower

EXPERIMENT = """\
[data]
max_rows = 600
[clients]
num_clients = 3
active_experts = "8,4,1"
[training]
max_steps = 4
[server]
num_server_rounds = 6
[evaluation]
rows_per_category = 1
max_new_tokens = 1
generate_every = 0
"""
TARGETS = ("trainer", "client job", "site parent", "server job", "server parent", "hub driver")
PATIENCE_SECONDS = 600.0
ORPHAN_SECONDS = 90.0
"""For which a process may live on after its run; the engine ends jobs by heartbeats."""


def flower_on_disk(folder: Path, config: Path) -> AbstractContextManager[Loopback]:
    """With a SuperLink that knows its nodes again when it is back."""
    return loopback_flower(folder, config, "--database", "superlink.db")


FEDERATE: dict[str, Federate] = {"nvflare": loopback, "flower": flower_on_disk}
PACKAGES = {"nvflare": "nvflare", "flower": "flwr"}
JOBS = ("runner_process", "worker_process", "flwr-serverapp", "flwr-clientapp")
"""In the command lines of processes that serve a job."""


def job_of(federation: Loopback, service: str) -> int | None:
    """The job process below a service of the engine, if there is one."""
    children = descendants(federation.services[service].process.pid)
    return next((pid for pid in children if any(job in words(pid, "cmdline") for job in JOBS)), None)


def words(pid: int, what: str) -> str:
    """The process's command line or environment; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def kill(federation: Loopback, target: str, driver: subprocess.Popen[str], rng: random.Random) -> bool:
    """Whether there was such a process."""
    site, hub = rng.choice(SITES), next(name for name in federation.services if not name.startswith("site"))
    pid = {
        "trainer": lambda: federation.services[f"{site} trainer"].process.pid,
        "client job": lambda: job_of(federation, f"{site} engine"),
        "site parent": lambda: federation.services[f"{site} engine"].process.pid,
        "server job": lambda: job_of(federation, hub),
        "server parent": lambda: federation.services[hub].process.pid,
        "hub driver": lambda: driver.pid if driver.poll() is None else None,
    }[target]()
    if pid is None:
        return False
    os.kill(pid, signal.SIGKILL)
    return True


def start(federation: Loopback, config: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    over = ["--engine", federation.engine, "--hub", str(federation.hub_file), "--output-dir", str(output)]
    return subprocess.Popen(
        [*FEDFLAME, "run", str(config), *over, *more], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def one_run(
    federation: Loopback, config: Path, output: Path, target: str, instant: float, rng: random.Random
) -> dict[str, Any]:
    """A run in which `target` is killed after `instant` seconds, or as soon as there is one."""
    begun = time.monotonic()
    driver = start(federation, config, output)
    time.sleep(instant)
    while not (killed := kill(federation, target, driver, rng)) and driver.poll() is None:
        time.sleep(0.02)
    said = driver.communicate(timeout=PATIENCE_SECONDS)[0]
    failed = []
    while driver.returncode and len(failed) < 3:
        failed.append([driver.returncode, said[-500:]])
        more = "--resume" if (output / "config.json").exists() else "--overwrite"
        driver = start(federation, config, output, more)
        said = driver.communicate(timeout=PATIENCE_SECONDS)[0]
    seconds = time.monotonic() - begun
    lines = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []
    excluded = [json.loads(line) for line in lines if json.loads(line)["event"] == "excluded"]
    return {
        "target": target, "instant": round(instant, 2), "killed": killed, "exit_code": driver.returncode,
        "resumed_after": failed, "seconds": round(seconds, 1), "adapter": adapter(output),
        "left_out": [[event["round"], event["client"], event["reason"]] for event in excluded],
    }  # fmt: skip


def adapter(output: Path) -> str:
    """All files of the adapter, in hex; empty where there is none."""
    import hashlib

    files = sorted((output / "adapter").rglob("*.safetensors"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest() if files else ""


def orphans(federation: Loopback) -> list[str]:
    """Command lines of this federation's processes that no service has started, or that serve a job."""
    services = [service.process.pid for service in federation.services.values()]
    theirs = {*services, *(pid for service in services for pid in descendants(service))}
    pids = {int(path.name) for path in Path("/proc").glob("[0-9]*")} - {os.getpid()}
    ours = {pid for pid in pids if str(federation.folder) in words(pid, "cmdline") + words(pid, "environ")}
    commands = {pid: words(pid, "cmdline") for pid in ours}
    return [said for pid, said in commands.items() if pid not in theirs or any(job in said for job in JOBS)]


def seconds_until_none_is_left(federation: Loopback) -> float | None:
    """How long processes of the last job lived on; None if they still do."""
    begun = time.monotonic()
    while time.monotonic() - begun < ORPHAN_SECONDS:
        if not orphans(federation):
            return round(time.monotonic() - begun, 1)
        time.sleep(0.5)
    return None


def wait_for_sites(federation: Loopback) -> None:
    begun = time.monotonic()
    while fedflame("hub", "check", federation.hub_file).returncode:
        if time.monotonic() - begun > PATIENCE_SECONDS:
            raise SystemExit("the sites did not come back")
        time.sleep(1)


def measure(
    engine: str, kills: int, seed: int, targets: Sequence[str], output: Path | None
) -> dict[str, Any]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fedflame-faults-") as name:
        folder = Path(name)
        config = folder / "experiment.toml"
        config.write_text(EXPERIMENT)
        must(fedflame("run", config, "--output-dir", folder / "one-process"))
        wanted = adapter(folder / "one-process")
        with FEDERATE[engine](folder / "federation", config) as federation:
            undisturbed = []
            for number in range(3):
                begun = time.monotonic()
                done = federation.run(config, folder / f"undisturbed-{number}")
                must(done)
                undisturbed.append(time.monotonic() - begun)
                assert adapter(folder / f"undisturbed-{number}") == wanted
            usual = median(undisturbed)
            runs: list[dict[str, Any]] = []
            for number in range(kills):
                for target in targets:
                    wait_for_sites(federation)
                    place = folder / "runs" / f"{target.replace(' ', '-')}-{number}"
                    run = one_run(federation, config, place, target, rng.uniform(0, usual), rng)
                    run["same_bytes"] = run.pop("adapter") == wanted
                    run["orphan_seconds"] = seconds_until_none_is_left(federation)
                    runs.append(run)
                    print(json.dumps(run), flush=True)
                    if output:
                        output.write_text(json.dumps(summary(engine, runs, usual), indent=1) + "\n")
            return summary(engine, runs, usual)


def summary(engine: str, runs: list[dict[str, Any]], usual: float) -> dict[str, Any]:
    """The table by target, and every run."""
    return {
        "undisturbed_seconds": round(usual, 1), "table": by_target(runs, usual), "runs": runs,
        "environment": environment() | {engine: version(PACKAGES[engine])},
    }  # fmt: skip


def by_target(runs: list[dict[str, Any]], usual: float) -> dict[str, dict[str, Any]]:
    table = {}
    for target in dict.fromkeys(run["target"] for run in runs):
        these = [run for run in runs if run["target"] == target]
        whole = [run for run in these if not run["left_out"]]
        table[target] = {
            "kills": sum(run["killed"] for run in these),
            "ended_well": sum(run["exit_code"] == 0 and not run["resumed_after"] for run in these),
            "resumed_by_hand": sum(bool(run["resumed_after"]) for run in these),
            "all_replies_counted": len(whole),
            "of_these_same_bytes": sum(run["same_bytes"] for run in whole),
            "median_seconds_to_recover": round(median(run["seconds"] for run in these) - usual, 1),
            "longest_seconds_to_recover": round(max(run["seconds"] for run in these) - usual, 1),
            "processes_left_behind": sum(run["orphan_seconds"] is None for run in these),
        }
    return table


COLUMNS = {
    "kills": "kills", "ended_well": "ended by themselves", "resumed_by_hand": "resumed by hand",
    "all_replies_counted": "all replies counted", "of_these_same_bytes": "of these, same bytes",
    "median_seconds_to_recover": "recovery, median s", "longest_seconds_to_recover": "longest s",
    "processes_left_behind": "left behind",
}  # fmt: skip


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """A row per process that was killed."""
    rows = [["killed", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    rows += [[target, *(str(row[name]) for name in COLUMNS)] for target, row in table.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=list(FEDERATE), default="nvflare")
    parser.add_argument("--kills", type=int, default=20, help="of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, help="print the table of these results, and measure nothing")
    given = parser.parse_args()
    if given.show:
        shown = json.loads(given.show.read_text())
        print(markdown(by_target(shown["runs"], shown["undisturbed_seconds"])))
        return
    result = measure(given.engine, given.kills, given.seed, given.targets.split(","), given.output)
    print(markdown(result["table"]))


if __name__ == "__main__":
    main()
