"""docs/paper.md: one table of paper / ours / verdict, and a section with a figure for each run."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reproduce.experiment import RESULTS
from upweight.tables import atomic_write

__all__ = ["EXPERIMENTS", "PAGE", "page", "records", "write"]

PAGE = Path(__file__).parent.parent / "docs" / "paper.md"
# In the paper's order; what is beyond the paper comes last.
EXPERIMENTS = (
    "fig1_components",
    "fig2_logistic",
    "fig2_network",
    "fig3_hinge",
    "fig4_photos",
    "fig5_attacks",
    "fig5_cats",
    "sec53_hospital",
    "fig6_mail",
    "appendix_newton",
    "groups",
    "subsample",
    "l2_derivative",
)

MARKS = {"met": "met", "surpassed": "**surpassed**", "missed": "**missed**"}


def records(results: Path = RESULTS) -> list[dict[str, Any]]:
    """What is stored, in the paper's order."""
    paths = [results / f"{name}.json" for name in EXPERIMENTS]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    return [record for record in found if "claims" in record]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| where | what | paper | ours | verdict |", "|---|---|---|---|---|"]
    for record in found:
        for claim in record["claims"]:
            said = [_cell(claim[key]) for key in ("what", "paper", "ours")]
            mark = MARKS[claim["verdict"]]
            lines.append(
                f"| [{record['where']}](#{record['name']}) | {' | '.join(said)} | {mark} |"
            )
    return lines


def _section(record: dict[str, Any], beside: str) -> list[str]:
    name = record["name"]
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    lines = [f'<a id="{name}"></a>', "", f"## {record['where']}: {record['title']}", ""]
    for note in record["notes"]:
        lines += [note, ""]
    lines += [f"![{record['title']}]({beside}/{name}.png)", ""]
    reasons: dict[str, list[str]] = {}
    for claim in record["claims"]:
        if claim["note"]:
            what = f"*{claim['what']}* ({claim['verdict']})"
            reasons.setdefault(claim["note"], []).append(what)
    lines += [f"* {'; '.join(about)}: {note}" for note, about in reasons.items()]
    lines += ["", f"`python -m reproduce.{name}`: {record['wall_seconds']:.0f} s, "
              f"{record['cpu_seconds']:.0f} CPU s ({record['machine']}; "
              f"torch {record['versions']['torch']}). Settings: {settings}. "
              f"Numbers: [{name}.json]({beside}/{name}.json).", ""]  # fmt: skip
    return lines


def page(found: Sequence[dict[str, Any]], beside: str = "../reproduce/results") -> str:
    """The page's Markdown.

    Args:
        found: stored records.
        beside: path of their figures, as seen from the page.
    """
    verdicts = [claim["verdict"] for record in found for claim in record["claims"]]
    count = {kind: verdicts.count(kind) for kind in MARKS}
    lines = [
        "# The paper, reproduced",
        "",
        "Every experiment of Koh & Liang, *Understanding Black-box Predictions via Influence "
        "Functions* (ICML 2017), and some beyond it. This page is written by "
        "`python -m reproduce page` from the stored results; `make reproduce` makes those anew. "
        "“Paper” is what the paper or its released code reports, or the target set from it.",
        "",
        f"{len(verdicts)} lines: {count['met']} met, {count['surpassed']} surpassed, "
        f"{count['missed']} missed. The reason for each miss stands in its section.",
        "",
        *_table(found),
        "",
    ]
    for record in found:
        lines += _section(record, beside)
    return "\n".join(lines).rstrip() + "\n"


def write(out: Path = PAGE) -> None:
    """Make the page anew from the stored results."""
    atomic_write(out, page(records(), os.path.relpath(RESULTS, out.parent)).encode())
    print(os.path.relpath(out))
