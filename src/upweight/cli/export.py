"""``upweight export``: the scores of a run in another program's layout."""

from pathlib import Path

from upweight.cli.show import say
from upweight.exports import influence_json
from upweight.scores import Scores

__all__ = ["export"]

LAYOUTS = {"ptif": influence_json}


def export(directory: Path, out: Path, layout: str) -> int:
    """Write the scores of a run directory to a file.

    Raises:
        UpweightError: of the kind that tells what is at fault; nothing is written then.
    """
    scores = Scores.load(directory)
    LAYOUTS[layout](scores, out)
    queries, examples = scores.shape
    say(f"wrote {out}: {queries:,} queries by {examples:,} training examples")
    return 0
