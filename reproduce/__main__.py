"""Run experiments by name: ``python -m reproduce NAME ... | quick | all | page``.

``quick`` is everything that takes minutes; ``all`` adds the network and the attacks (hours; a killed run goes on where it was).
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from reproduce.page import EXPERIMENTS, write

LONG = ("fig2_network", "fig5_attacks", "fig5_cats")


def _run(name: str, jobs: int) -> tuple[str, int]:
    """One experiment in a process of its own: memory is given back, a failure loses no other."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [sys.executable, "-m", f"reproduce.{name}"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, check=False)
    return name, done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduce", description=__doc__)
    parser.add_argument("names", nargs="*", default=["list"], metavar="NAME",
                        help="experiments, or quick, all, page")  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, help="experiments at once, sharing the cores"
    )
    given = parser.parse_args()
    asked, jobs = given.names, max(1, given.jobs)
    groups = {"all": EXPERIMENTS, "quick": tuple(n for n in EXPERIMENTS if n not in LONG)}
    names = [name for word in asked for name in groups.get(word, (word,))]
    unknown = set(names) - {*EXPERIMENTS, "page", "list"}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(EXPERIMENTS)}")
    if names == ["list"]:
        for name in EXPERIMENTS:
            found = importlib.import_module(f"reproduce.{name}").EXPERIMENT
            print(f"{name:18} {found.where}: {found.title}")
        return
    began, todo = time.perf_counter(), [name for name in names if name != "page"]
    with ThreadPoolExecutor(jobs) as pool:
        failed = [name for name, bad in pool.map(lambda name: _run(name, jobs), todo) if bad]
    if todo:
        print(f"{len(todo)} experiments, {time.perf_counter() - began:.0f} s")
    write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
