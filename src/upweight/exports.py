"""Scores in layouts that other programs read."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from upweight.errors import DataError, InputError, NonFiniteError
from upweight.scores import Scores
from upweight.store import plain
from upweight.tables import atomic_write

__all__ = ["influence_json"]

SAYS = (
    "influence = minus the predicted change of the query's loss ({unit}) if the training example "
    "is removed; negative = helpful, positive = harmful."
)


def influence_json(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    labels: Iterable[Any] | None = None,
    seconds: float | None = None,
    k: int = 500,
) -> Path:
    """Write scores as pytorch_influence_functions lays out its ``influence_results_*.json``.

    One entry per query, under its id as text: ``label``, ``num_in_dataset`` (place among the
    queries), ``time_calc_influence_s``, ``influence`` (one number per training example),
    ``harmful`` and ``helpful`` (places in ``influence``, the strongest first), as
    ``calc_img_wise`` writes them (Blume, pytorch_influence_functions 0.1.1). A key ``upweight``
    beside them holds method, damping, ids and a sentence.

    ``influence[i]`` = −score = share_i · I_up,loss, in the loss's unit: negative helps, positive
    harms. That is their sign and their 1/N; their numbers are ``scale`` times as large, because
    they do not divide by it at the end. Their two lists are swapped; these are not.

    Args:
        scores: of the loss.
        path: the file; one that exists is replaced.
        labels: of the queries, in their order; null where there are none.
        seconds: that a query took; null by default.
        k: length of the two lists.

    Raises:
        InputError: the scores are no changes of a loss, or k is not positive.
        DataError: the labels do not match the queries, or two ids read the same as text.
        NonFiniteError: a score is NaN or infinite.
        StoreError: the file cannot be written; nothing is left behind.

    Example:
        >>> import tempfile, torch, upweight as uw
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> model = torch.nn.Linear(3, 2)
        >>> scores = uw.influence(model, (x, y), (x[:2], y[:2]), loss="cross_entropy", l2=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = influence_json(scores, folder + "/influence_results_0_1.json", labels=y[:2])
        ...     entry = json.loads(path.read_text())["0"]
        >>> entry["label"], len(entry["influence"]), entry["influence"][entry["helpful"][0]] < 0
        (0, 20, True)
    """
    _refuse(scores, k)
    keys = [str(key) for key in scores.query_ids.tolist()]
    if len(set(keys)) < len(keys):
        raise DataError("Two query ids read the same as text. Give the queries other ids.")
    given = [None] * len(keys) if labels is None else [_bare(label) for label in labels]
    if len(given) != len(keys):
        raise DataError(
            f"There are {len(given)} labels for {len(keys)} queries. Pass one for each query."
        )
    lines = []
    for place, key in enumerate(keys):
        content = {
            "label": given[place],
            "num_in_dataset": place,
            "time_calc_influence_s": seconds,
            **_effects(scores, place, k),
        }
        lines.append(f"{json.dumps(key)}: {json.dumps(plain(content), allow_nan=False)}")
    return atomic_write(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _refuse(scores: Scores, k: int) -> None:
    """Say no to what the layout has no room for."""
    meaning = scores.meaning
    if not meaning.change or meaning.measure != "loss":
        raise InputError(
            f"This layout holds changes of a loss, and these scores say: {meaning.sentence()} "
            "Use to_csv(), whose columns say what they mean."
        )
    if k < 1:
        raise InputError(f"k must be at least 1, got {k!r}.")


def _effects(scores: Scores, place: int, k: int) -> dict[str, Any]:
    """The numbers of one query, its two lists, and what upweight adds."""
    row = np.asarray(scores.values[place])
    if not np.isfinite(row).all():
        raise NonFiniteError(
            f"The scores of query {scores.query_ids[place]!r} are not all finite, and JSON has no "
            "NaN. Explain it again with more damping or another method."
        )
    order = np.argsort(-row, kind="stable")[:k], np.argsort(row, kind="stable")[:k]
    helpful, harmful = (side.tolist() for side in order)
    made = scores.provenance
    return {
        "influence": (0 - row).tolist(),
        "harmful": harmful,
        "helpful": helpful,
        "upweight": {
            "says": SAYS.format(unit=scores.meaning.score_unit),
            "method": made.method,
            "damping": made.damping,
            "caveats": made.caveats,
            "identity": made.identity,
            "helpful_ids": scores.train_ids[helpful].tolist(),
            "harmful_ids": scores.train_ids[harmful].tolist(),
        },
    }


def _bare(label: Any) -> Any:
    """A plain Python value of a tensor's or array's element."""
    return label.tolist() if hasattr(label, "tolist") else label
