"""What retraining found: measures of queries after each trial."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final
from zipfile import BadZipFile

import numpy as np

from upweight.errors import InputError, StoreError
from upweight.evaluation.ceiling import Ceiling, ceiling
from upweight.fingerprints import fingerprint
from upweight.meaning import Meaning
from upweight.retraining.trials import Relabels, Trials
from upweight.store import plain, publish, read_manifest, write_manifest

__all__ = ["Truth"]

FILE = "truth.npz"
CLOSE = 1e-3
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, zlib.error)


@final
@dataclass(frozen=True)
class Truth:
    """Measures of queries under models that were really trained again.

    Two questions can be asked of it. *This model*: what would have become of the model at hand, had
    the same training run without these examples? *On average*: what happens to models that are
    trained so, over their seeds? A method that sees one model answers the first or the second,
    seldom both; ``ceiling`` says how far the noise of training lets any prediction come.

    Attributes:
        trials: what each was trained on.
        query_ids: ``[q]``.
        measured: after each trial, ``[m, q]``; NaN where it failed.
        whole: after training on all of the data with each seed, ``[number of seeds, q]``.
        seeds: of the rows of ``whole``; those of the trials are among them.
        meaning: measure and unit.
        how: in words, what was trained and how.
        failures: trial to what went wrong.
        own: the seed with which the model at hand was made; None if that is not known.
        at_hand: measures of the model at hand, ``[q]``; None if they are not known.
        drift: how far training on all of the data with each seed ends from the model at hand,
            ‖θ − θ̂‖ / ‖θ̂‖, ``[number of seeds]``; NaN where that is not known.
        notes: what should be known of how it came about.
    """

    trials: Trials
    query_ids: np.ndarray
    measured: np.ndarray
    whole: np.ndarray
    seeds: np.ndarray
    meaning: Meaning
    how: str
    failures: Mapping[int, str]
    own: int | None = None
    at_hand: np.ndarray | None = None
    drift: np.ndarray | None = None
    notes: tuple[str, ...] = field(default=())

    def changes(self) -> np.ndarray:
        """What each trial changed, against all of the data with the same seed, ``[m, q]``."""
        base = self.whole[[self.seeds.tolist().index(seed) for seed in self.trials.seeds.tolist()]]
        change: np.ndarray = self.measured - base
        return change

    def by_seed(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct changes of the data ``[u, N]``, and what each changed ``[s, u, q]`` per seed.

        One row s is the answer for the model of that seed; their mean is the answer on average,
        and how far they are apart is the noise that bounds every prediction. Seeds rise.

        Raises:
            InputError: not every change was made with every seed once.
        """
        seeds, keys = self.trials.seeds, self.trials.changes()
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))[which]
        order = np.lexsort((rank, seeds))
        count, u = len(np.unique(seeds)), len(first)
        table = rank[order].reshape(count, u) if len(order) == count * u else np.empty((0, 0))
        if table.shape != (count, u) or (table != np.arange(u)).any():
            raise InputError(
                f"{len(order)} trials of {u} changes of the data and {count} seeds: by_seed needs "
                "every change with every seed once, as Trials.subsets and Trials.without make them."
            )
        gone = self.trials.gone[np.sort(first)]
        return gone, self.changes()[order].reshape(count, u, -1)

    def this_model(self) -> np.ndarray:
        """What each change of the data does to the model at hand, ``[u, q]``, by its own seed.

        That is so as far as its training can be repeated: ``reproduced`` says whether.

        Raises:
            InputError: its seed is not known, or not among those of the trials.
        """
        seeds = np.unique(self.trials.seeds).tolist()
        if self.own not in seeds:
            raise InputError(
                f"The model at hand was made with seed {self.own}, the trials have {seeds}. "
                "Make trials with its seed, or name it (Training(seed=...), Own(seed=...))."
            )
        found: np.ndarray = self.by_seed()[1][seeds.index(self.own)]
        return found

    def on_average(self) -> np.ndarray:
        """What each change of the data does on average over the seeds, ``[u, q]``.

        NaN where a trial of any seed failed.
        """
        found: np.ndarray = self.by_seed()[1].mean(0)
        return found

    @property
    def reproduced(self) -> bool | None:
        """Whether training with the model's own seed gives the model at hand; None if unknown.

        Its measures are the same up to rounding, a thousandth of the largest.
        """
        if self.own not in self.seeds.tolist() or self.at_hand is None:
            return None
        apart = np.abs(self.whole[self.seeds.tolist().index(self.own)] - self.at_hand)
        return bool(apart.max() <= CLOSE * np.abs(self.at_hand).max())

    def ceiling(self, *, seeds: int | None = None) -> Ceiling:
        """The highest correlation that a prediction can have with the mean over some seeds.

        Of predictions that do not know how chance fell in these very trainings. See
        ``evaluation.ceiling``.

        Args:
            seeds: over how many the changes are averaged; all by default, 1 for one model.
        """
        changes = self.by_seed()[1]
        kept = np.isfinite(changes).all((0, 2))
        return ceiling(changes[:, kept], seeds=len(changes) if seeds is None else seeds)

    def __repr__(self) -> str:
        lines = [
            f"Truth: {len(self.trials)} trials ({self.trials.kind}), {len(self.query_ids)} queries",
            f"  measure {self.meaning.measure} ({self.meaning.unit}); {self.how}",
        ]
        if self.drift is not None and self.own in self.seeds.tolist():
            moved = float(self.drift[self.seeds.tolist().index(self.own)])
            says = {True: "gives the model at hand", False: "gives another model", None: ""}
            lines.append(f"  its own seed {says[self.reproduced]} (parameters {moved:.1e} apart)")
        lines += [f"  {len(self.failures)} failed: {next(iter(self.failures.values()))}"
                  for _ in range(bool(self.failures))]  # fmt: skip
        return "\n".join(lines + [f"  note: {text}" for text in self.notes])

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> Path:
        """Write a directory with manifest.json and truth.npz, complete or absent.

        Raises:
            StoreError: the place belongs to something else or cannot be written.
        """
        arrays = self._arrays()
        manifest = {
            "kind": "truth",
            "identity": fingerprint((arrays, self.how)),
            "trials": self.trials.kind,
            "examples": self.trials.gone.shape[1],
            "meaning": asdict(self.meaning),
            "how": self.how,
            "failures": {str(trial): said for trial, said in self.failures.items()},
            "own": self.own,
            "notes": list(self.notes),
        }
        with publish(path, manifest["identity"], replace=replace) as part:
            np.savez_compressed(part / FILE, **arrays)  # type: ignore[arg-type]
            write_manifest(part, plain(manifest))
        return Path(path)

    def _arrays(self) -> dict[str, np.ndarray]:
        found = {
            "gone": np.packbits(self.trials.gone, axis=1),
            "trial_seeds": self.trials.seeds,
            "query_ids": self.query_ids,
            "measured": self.measured,
            "whole": self.whole,
            "seeds": self.seeds,
        }
        if self.trials.relabels is not None:
            found |= {f"new_{name}": value for name, value in vars(self.trials.relabels).items()}
        more = {"at_hand": self.at_hand, "drift": self.drift}
        return found | {name: value for name, value in more.items() if value is not None}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Truth":
        """Read what ``save`` wrote.

        Raises:
            StoreError: absent, damaged, or of another schema.
        """
        manifest = read_manifest(path)
        try:
            with (Path(path) / FILE).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return cls._of(manifest, dict(file))
        except UNREADABLE as error:
            raise StoreError(f"{path} holds no truth that can be read ({error}).") from error

    @classmethod
    def _of(cls, manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> "Truth":
        relabels = None
        if "new_trial" in arrays:
            relabels = Relabels(*(arrays[f"new_{n}"] for n in ("trial", "position", "label")))
        gone = np.unpackbits(arrays["gone"], axis=1, count=manifest["examples"]).astype(bool)
        return cls(
            trials=Trials(manifest["trials"], gone, arrays["trial_seeds"], relabels),
            query_ids=arrays["query_ids"],
            measured=arrays["measured"],
            whole=arrays["whole"],
            seeds=arrays["seeds"],
            meaning=Meaning(**manifest["meaning"]),
            how=manifest["how"],
            failures={int(trial): said for trial, said in manifest["failures"].items()},
            own=manifest["own"],
            at_hand=arrays.get("at_hand"),
            drift=arrays.get("drift"),
            notes=tuple(manifest["notes"]),
        )
