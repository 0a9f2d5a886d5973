"""Scores of several models of the same training data, combined.

What is combined are finished scores,

    score[q, i] = Σ_m c_m · score_m[q, i],

and neither parameters, nor curvatures, nor kernels.
"""

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
import torch

from upweight import audits
from upweight.bars import track
from upweight.budget import budget
from upweight.data import Data
from upweight.ensemble.members import Common, Member
from upweight.errors import DataError, InputError, UpweightError
from upweight.fingerprints import fingerprint
from upweight.front import Influence
from upweight.objective import Measure
from upweight.scores import Extremes, Provenance, Scores
from upweight.sinks import ExtremesSink
from upweight.store import MANIFEST, open_array, resume, write_manifest
from upweight.tables import Table

__all__ = ["Combined"]

Answer = TypeVar("Answer")
SHOWN = 3


class Combined(ABC):
    """Σ_m c_m scores_m over models m of the same training data.

    Members that are functions make their model when it is their turn, and it is gone before the
    next one is made. Every question asks all of them, from their fit on; what members keep on disk
    they do not make again.

    Args:
        members: Influence objects, or functions that make one.
        coefficients: c_m, one for each.
        called: what coefficients are called in messages.

    Raises:
        InputError: there is no member, or coefficients are not one for each, finite, not negative
            and somewhere positive.
    """

    def __init__(
        self, members: Sequence[Member], coefficients: Sequence[float], *, called: str
    ) -> None:
        if not members:
            raise InputError("There is no member. Pass at least one Influence, or one state.")
        others = [m for m in members if not (isinstance(m, Influence) or callable(m))]
        if others:
            raise InputError(
                f"A member is an Influence or a function that makes one, got "
                f"{type(others[0]).__name__}. For states of one model use Ensemble.of."
            )
        row = np.asarray(coefficients, dtype=np.float64)
        if row.shape != (len(members),):
            raise InputError(
                f"{len(members)} members take one of the {called} each, got {row.size}. Pass as "
                "many as there are members."
            )
        if not (np.isfinite(row).all() and (row >= 0).all() and row.any()):
            raise InputError(
                f"The {called} are finite, not negative and not all 0, got {row.tolist()}. Leave "
                "members out that are not to count."
            )
        self.coefficients: np.ndarray = row
        self._members = tuple(members)
        self._common: Common | None = None
        self._identities: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} models"

    @abstractmethod
    def _name(self, methods: str) -> str:
        """The method of the combination, from the names of its members'."""

    @abstractmethod
    def _caveats(self, spread: float) -> tuple[str, ...]:
        """What a reader must know; spread is Σ c_m ‖scores_m‖² / (Σ c_m ‖scores‖²)."""

    def _refuse(self, member: Influence) -> None:
        """Raise InputError for a member of a kind that cannot be combined so."""
        del member

    def _answer(self, member: Member, question: Callable[[Influence], Answer]) -> Answer:
        """What one member answers; a model that is made for it goes with this call."""
        asked = member if isinstance(member, Influence) else member()
        if not isinstance(asked, Influence):
            raise InputError(f"It is made as a {type(asked).__name__}. Return an Influence.")
        self._refuse(asked)
        common = Common(asked)
        self._common = self._common or common
        difference = self._common.difference(common)
        if difference is not None:
            raise DataError(
                f"It has {difference} than the first. Scores of different examples, or under "
                "different losses, have no mean: give all members the same Data and loss."
            )
        return question(asked)

    def _asked(self, question: Callable[[Influence], Answer]) -> Iterator[Answer]:
        """What the members answer, in order."""
        for place, member in enumerate(track(self._members, "members", len(self))):
            try:
                answer = self._answer(member, question)
            except UpweightError as error:
                raise type(error)(f"Member {place} of {len(self)}: {error}") from error
            yield answer

    @property
    def identity(self) -> str:
        """Hash of the members' models, data and settings with their coefficients, in any order."""
        if not self._identities:
            self._identities = tuple(self._asked(lambda member: member.identity))
        pairs = zip(self._identities, self.coefficients.tolist(), strict=True)
        return fingerprint((type(self).__name__, sorted(pairs)))

    def _identity_of(self, queries: Data, measure: Measure | None) -> str:
        return fingerprint((self.identity, queries.fingerprint(), measure))

    def explain(
        self, queries: Any, *, measure: Measure | None = None, accept: bool = False
    ) -> Scores:
        """Scores of every training example for every query, combined over the members.

        The residual of a query is the largest that a member has.

        Args:
            queries: like the training data; inputs with targets.
            measure: what is asked of a query; the objectives' own by default.
            accept: keep solves that failed; the scores then say so.

        Raises:
            DataError: a member has other data, or another loss, than the first.
            NotConvergedError, IndefiniteError: a solve failed.
        """
        data = Data.of(queries)
        total: np.ndarray = np.zeros(())
        told: list[_Told] = []
        identities: list[str] = []

        def question(member: Influence) -> tuple[Scores, str]:
            return member.explain(data, measure=measure, accept=accept), member.identity

        found = zip(self.coefficients, self._asked(question), strict=True)
        for coefficient, (scores, identity) in found:
            total = total + coefficient * scores.values.astype(np.float64)
            told.append(_Told.of(scores))
            identities.append(identity)
        self._identities = tuple(identities)
        values = total.astype(told[0].dtype)
        return self._scores(values, told, self._identity_of(data, measure))

    def _scores(self, values: np.ndarray, told: Sequence["_Told"], identity: str) -> Scores:
        """Combined values with everything needed to read them."""
        first = told[0].empty
        for place, other in enumerate(told):
            if other.empty.meaning != first.meaning:
                raise InputError(
                    f"Member {place} of {len(self)} answers in {other.empty.meaning.score_unit!r} "
                    f"({other.empty.meaning.measure}), the first in {first.meaning.score_unit!r} "
                    f"({first.meaning.measure}). Give all members methods and measures of one unit."
                )
        whole = _square(values)
        mixed = float(self.coefficients @ [one.square for one in told])
        sources = [one.empty.provenance for one in told]
        dampings = [source.damping for source in sources]
        notes = list(self._caveats(mixed / max(whole, 1e-300)))
        if min(dampings) != max(dampings):
            notes.append(f"dampings of members from {min(dampings):g} to {max(dampings):g}")
        return Scores(
            values,
            first.query_ids,
            first.train_ids,
            shares=first.shares,
            meaning=first.meaning,
            provenance=Provenance(
                method=self._name(", ".join(dict.fromkeys(source.method for source in sources))),
                damping=float(np.mean(dampings)),
                removal=first.provenance.removal,
                coverage=min(source.coverage for source in sources),
                identity=identity,
                residual=np.fmax.reduce([source.residual for source in sources]),
                caveats=(*notes, *_merged([source.caveats for source in sources])),
            ),
        )

    def explain_into(
        self, path: str | PathLike[str], queries: Any, *, replace: bool = False
    ) -> Scores:
        """The scores of ``explain`` in a run directory, member by member and batch by batch.

        A killed run goes on where it was. Until it is done, the scores of all members take their
        own room beside it.

        Args:
            path: a new directory, or one of the same run.
            queries: like the training data; inputs with targets.
            replace: write over a directory of another run.

        Raises:
            DataError: a member has other data, or another loss, than the first.
            StoreError: the place belongs to another run or cannot be written.
            NotConvergedError, IndefiniteError: a solve failed.
        """
        data = Data.of(queries)
        identity = self._identity_of(data, None)
        with resume(path, identity, replace=replace) as part:
            members = part / "members"
            if not (part / MANIFEST).exists():

                def question(member: Influence) -> Scores:
                    place = members / member.identity
                    if (place / MANIFEST).exists():
                        return Scores.load(place)
                    return member.explain_into(place, data)

                self._merge(part, list(self._asked(question)), identity)
            shutil.rmtree(members, ignore_errors=True)
        return Scores.load(path)

    def _merge(self, part: Path, found: Sequence[Scores], identity: str) -> None:
        """Write the combination of stored scores, some queries at a time."""
        first = found[0].values
        values = open_array(part / "scores.npy", first.shape, first.dtype)
        for rows in _rows(values):
            values[rows] = sum(
                c * scores.values[rows].astype(np.float64)
                for c, scores in zip(self.coefficients, found, strict=True)
            )
        values.flush()
        scores = self._scores(values, [_Told.of(one) for one in found], identity)
        scores.write_beside(part)
        write_manifest(part, {"kind": "scores", **scores.summary()})

    def extremes(self, queries: Any, k: int = 10, *, measure: Measure | None = None) -> Extremes:
        """The k most helpful and most harmful examples of every query, by the combined scores.

        Unlike those of one model they cannot stream by: all scores are held while members are
        asked, q·N numbers.

        Raises:
            DataError: a member has other data, or another loss, than the first.
            InputError: k is less than 1.
            NotConvergedError, IndefiniteError: a solve failed.
        """
        data = Data.of(queries)
        sink = ExtremesSink(len(data), k)
        scores = self.explain(data, measure=measure)
        sink.write(0, torch.from_numpy(scores.values))
        ids = scores.query_ids, scores.train_ids
        return Extremes.of(sink, ids, meaning=scores.meaning, provenance=scores.provenance)

    def self_influence(self) -> np.ndarray:
        """Predicted rise of each example's own loss if it is removed, combined, ``[N]``.

        Raises:
            DataError: a member has other data, or another loss, than the first.
        """
        found = list(self._asked(lambda member: member.self_influence()))
        return self._combined(found)

    def _combined(self, values: Sequence[np.ndarray]) -> np.ndarray:
        total: np.ndarray = self.coefficients @ np.stack(values).astype(np.float64)
        return total.astype(values[0].dtype)

    def audit(self) -> Table:
        """Suspicious labels, worst first by the combined self-influence.

        Losses and margins are weighted means, the predicted label is the one that most predict.

        Raises:
            DataError: a member has other data, or another loss, than the first.
        """

        def question(member: Influence) -> tuple[np.ndarray, audits.Survey]:
            return member.self_influence(), audits.survey(member.risk)

        owns, surveys = zip(*self._asked(question), strict=True)
        assert self._common is not None
        weights = (self.coefficients / self.coefficients.sum()).tolist()
        return audits.listed(
            self._common.data.ids,
            self._combined(owns),
            audits.pooled(surveys, weights),
            unit=self._common.loss.unit,
        )


@final
@dataclass(frozen=True)
class _Told:
    """What remains of a member's scores when they are added.

    Attributes:
        empty: the scores without values.
        square: Σ of their squares.
        dtype: of their values.
    """

    empty: Scores
    square: float
    dtype: np.dtype

    @classmethod
    def of(cls, scores: Scores) -> "_Told":
        """Let go of the values."""
        empty = Scores(
            np.empty((0, 0)),
            scores.query_ids,
            scores.train_ids,
            shares=scores.shares,
            meaning=scores.meaning,
            provenance=scores.provenance,
        )
        return cls(empty, _square(scores.values), scores.values.dtype)


def _rows(values: np.ndarray) -> Iterator[slice]:
    """Queries at a time, within the memory budget in float64."""
    step = max(1, budget() // 4 // (8 * max(values.shape[1], 1)))
    for start in range(0, len(values), step):
        yield slice(start, start + step)


def _square(values: np.ndarray) -> float:
    """The sum of squares, in float64."""
    return sum(float(np.square(values[rows], dtype=np.float64).sum()) for rows in _rows(values))


def _merged(caveats: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What all members say once, and what some say with how many."""
    counts = Counter(text for told in caveats for text in told)
    common = [text for text, count in counts.items() if count == len(caveats)]
    some = [text for text in counts if text not in common]
    listed = [f"{counts[text]} of {len(caveats)} members: {text}" for text in some[:SHOWN]]
    more = [f"{len(some) - SHOWN} more notes of members"] if len(some) > SHOWN else []
    return (*common, *listed, *more)
