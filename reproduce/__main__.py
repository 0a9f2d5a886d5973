"""Run experiments by name: ``python -m reproduce NAME ... | quick | all | page``.

``quick`` is everything that takes minutes; ``all`` adds the network and the attacks (hours; a killed run goes on where it was).
"""

import argparse
import importlib
import subprocess
import sys

from reproduce.page import EXPERIMENTS
from reproduce.page import main as write_page

LONG = ("fig2_network", "fig5_attacks", "fig5_cats")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reproduce", description=__doc__)
    parser.add_argument("names", nargs="*", default=["list"], metavar="NAME",
                        help="experiments, or quick, all, page")  # fmt: skip
    asked = parser.parse_args().names
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
    for name in names:
        if name != "page":
            # A process each: memory is given back, and one failure does not lose the rest.
            subprocess.run([sys.executable, "-m", f"reproduce.{name}"], check=True)
    sys.argv = sys.argv[:1]
    write_page()


if __name__ == "__main__":
    main()
