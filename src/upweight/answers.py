"""What the front gives back besides scores: parameter changes, perturbations, evidence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from torch import Tensor

from upweight.evaluation import Agreement
from upweight.meaning import Meaning
from upweight.packages import require
from upweight.parameters import ParameterSpace
from upweight.scores import Scores
from upweight.tables import Table

__all__ = [
    "GroupEffects",
    "L2Derivative",
    "ParameterChange",
    "Perturbation",
    "Sweep",
    "Validation",
    "WhatIf",
]


def _with_notes(table: Table, notes: tuple[str, ...]) -> str:
    return "\n".join([repr(table), *(f"note: {note}" for note in notes)])


def _with_notes_html(table: Table, notes: tuple[str, ...]) -> str:
    return table._repr_html_() + "".join(f"<p>{note}</p>" for note in notes)


@final
@dataclass(frozen=True)
class ParameterChange:
    """Predicted change of the parameters when each of some examples is removed.

    row_i = + share_i H⁻¹ ∇ℓ̃(z_i), which is −share_i · I_up,params(z_i) of Koh & Liang (2017).

    Attributes:
        ids: examples, ``[m]``.
        upweight: I_up,params = −H⁻¹ ∇ℓ̃(z_i), the derivative in the example's weight, ``[m, p]``.
        shares: w_i / Σ w, ``[m]``.
        space: names the blocks of a row.
    """

    ids: np.ndarray
    upweight: Tensor
    shares: Tensor
    space: ParameterSpace

    @property
    def rows(self) -> Tensor:
        """The changes on removal, −share_i times ``upweight``, ``[m, p]``."""
        return -self.upweight * self.shares[:, None]

    def blocks(self) -> dict[str, Tensor]:
        """The changes by parameter name, ``[m, *shape]``."""
        return self.space.unflatten(self.rows)


@final
@dataclass(frozen=True)
class Perturbation:
    """Predicted change of a query's measure per unit of change of a training input.

    values[q, i] = −share_i · s_q ∇_x∇_θ ℓ(z_i), which is share_i · I_pert,loss of Koh & Liang
    (2017): multiply by a small δ of the input and sum.

    Attributes:
        query_ids: ``[q]``.
        train_ids: ``[m]``.
        paper: I_pert,loss = −s_q ∇_x∇_θ ℓ(z_i), without the share, ``[q, m, *shape of the input]``.
        shares: w_i / Σ w, ``[m]``.
    """

    query_ids: np.ndarray
    train_ids: np.ndarray
    paper: Tensor
    shares: Tensor

    @property
    def values(self) -> Tensor:
        """share_i times ``paper``, of the same shape."""
        return self.paper * self.shares.view(1, -1, *[1] * (self.paper.dim() - 2))

    def magnitude(self) -> Tensor:
        """Sum of absolute values per query and example, ``[q, m]``: where an attack would aim."""
        return self.values.abs().flatten(2).sum(2)


@final
@dataclass(frozen=True)
class WhatIf:
    """Predicted measures of queries after a change of the training data.

    Attributes:
        query_ids: ``[q]``.
        before: the measure now, ``[q]``.
        change: its predicted change, ``[q]``, to first order.
        meaning: measure and unit.
        notes: what limits the prediction.
        second: its change by a Newton step on the remaining data, ``[q]``; None without one.
        low: lower ends of 90 % intervals of the change, ``[q]``; NaN where none is known.
        high: upper ends.
        actual: the change found by really training again, ``[q]``; None where that was not asked.
    """

    query_ids: np.ndarray
    before: np.ndarray
    change: np.ndarray
    meaning: Meaning
    notes: tuple[str, ...]
    second: np.ndarray | None
    low: np.ndarray
    high: np.ndarray
    actual: np.ndarray | None

    @property
    def after(self) -> np.ndarray:
        """The predicted measure, ``[q]``, to first order."""
        total: np.ndarray = self.before + self.change
        return total

    def table(self) -> Table:
        """One row per query; a column that nothing is known of is left out."""
        name = self.meaning.measure
        interval = bool(np.isfinite(self.low).any())
        columns = {
            "query": self.query_ids,
            f"{name}_now": self.before,
            f"predicted_change_of_{name}": self.change,
            "second_order": self.second,
            "low": self.low if interval else None,
            "high": self.high if interval else None,
            "actual_change": self.actual,
            f"predicted_{name}": self.after,
        }
        known = {head: column for head, column in columns.items() if column is not None}
        within = "; low to high: 90 % interval of the change" if interval else ""
        return Table(known, f"Predicted {name} in {self.meaning.unit} after the change{within}.")

    def __repr__(self) -> str:
        return _with_notes(self.table(), self.notes)

    def _repr_html_(self) -> str:
        return _with_notes_html(self.table(), self.notes)


@final
@dataclass(frozen=True)
class Validation:
    """Predicted against really refitted changes.

    Attributes:
        query_ids: ``[q]``.
        removed: ids of the removed examples, ``[m]``.
        chosen: "most influential" or "random" for each removal, ``[m]``.
        predicted: ``[q, m]``.
        actual: ``[q, m]``.
        agreements: by the way removals were chosen; slopes are NaN where scores have no size.
        meaning: measure and unit.
        truth: how the actual changes were made.
    """

    query_ids: np.ndarray
    removed: np.ndarray
    chosen: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    agreements: Mapping[str, Agreement]
    meaning: Meaning
    truth: str

    def __repr__(self) -> str:
        order = f" ({self.meaning.score_unit}, an order without size)" if self.meaning.per else ""
        what = f"Predicted{order} against actual change of {self.meaning.measure}"
        head = f"{what} ({self.meaning.unit}):"
        return "\n  ".join([head, *self.lines(), f"truth: {self.truth}"])

    def lines(self) -> list[str]:
        """How each kind of removal came out, in words; without a slope where scores only rank."""
        if not self.meaning.per:
            return [f"{name}: {found}" for name, found in self.agreements.items()]
        return [
            f"{name}: r = {found.r:.4f} [{found.r_interval[0]:.4f}, {found.r_interval[1]:.4f}], "
            f"rank r = {found.rank:.4f}, {found.count} pairs"
            for name, found in self.agreements.items()
        ]

    def table(self) -> Table:
        """One row per query and removal."""
        q, m = self.predicted.shape
        columns = {
            "query": np.repeat(self.query_ids, m),
            "removed": np.tile(self.removed, q),
            "chosen": np.tile(self.chosen, q),
            "predicted": self.predicted.ravel(),
            "actual": self.actual.ravel(),
        }
        apart = f", predicted in {self.meaning.score_unit}" if self.meaning.per else ""
        return Table(columns, f"Change of {self.meaning.measure} ({self.meaning.unit}){apart}")

    def plot(self, axes: Any = None) -> Any:
        """Scatter of actual over predicted, with the diagonal where units agree; the Axes."""
        if axes is None:
            axes = require("matplotlib.pyplot", "plot()").subplots(figsize=(5, 5))[1]
        for kind in self.agreements:
            which = self.chosen == kind
            axes.scatter(
                self.predicted[:, which].ravel(), self.actual[:, which].ravel(), s=12, label=kind
            )
        if not self.meaning.per:
            reach = float(max(np.abs(self.predicted).max(), np.abs(self.actual).max()))
            axes.plot([-reach, reach], [-reach, reach], color="grey", linewidth=0.8)
        axes.set(
            xlabel=f"predicted change of {self.meaning.measure} ({self.meaning.score_unit})",
            ylabel=f"actual change of {self.meaning.measure} ({self.meaning.unit})",
        )
        axes.legend()
        return axes


@final
@dataclass(frozen=True)
class GroupEffects:
    """Predicted change of queries' measures when each of some groups is removed as a whole.

    Attributes:
        query_ids: ``[q]``.
        groups: names, ``[m]``.
        sizes: examples in each group, ``[m]``.
        first: sum of the group's scores, ``[q, m]``.
        second: from a Newton step on the remaining data, ``[q, m]``; exact for quadratic losses.
        meaning: measure and unit.
    """

    query_ids: np.ndarray
    groups: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    second: np.ndarray
    meaning: Meaning

    @property
    def notes(self) -> tuple[str, ...]:
        """How far the two orders are apart, which is how far to trust the first."""
        gap, size = np.abs(self.first - self.second).sum(), np.abs(self.second).sum()
        if not size > 0:
            return ()
        return (f"First order is off the second by {gap / size:.1%} of the predicted change.",)

    def table(self) -> Table:
        """One row per query and group."""
        q, m = self.first.shape
        columns = {
            "query": np.repeat(self.query_ids, m),
            "group": np.tile(self.groups, q),
            "examples": np.tile(self.sizes, q),
            "first_order": self.first.ravel(),
            "second_order": self.second.ravel(),
        }
        name = self.meaning.measure
        return Table(
            columns, f"Predicted change of {name} ({self.meaning.unit}) if the group is removed."
        )

    def __repr__(self) -> str:
        return _with_notes(self.table(), self.notes)

    def _repr_html_(self) -> str:
        return _with_notes_html(self.table(), self.notes)


@final
@dataclass(frozen=True)
class L2Derivative:
    """Derivative of queries' measures in the L2 strength: measure's unit per unit of l2.

    Attributes:
        query_ids: ``[q]``.
        blocks: names of the parameters, b of them.
        patterns: of the stated l2 that governs each block; None where none does.
        values: dm(q)/dλ_b, ``[q, b]``. Positive: more L2 on that block raises the measure.
        meaning: measure and unit.
    """

    query_ids: np.ndarray
    blocks: tuple[str, ...]
    patterns: tuple[str | None, ...]
    values: np.ndarray
    meaning: Meaning

    def by_pattern(self) -> dict[str, np.ndarray]:
        """The derivative in each stated l2, ``[q]``, by its pattern ("*" for a single number)."""
        stated = dict.fromkeys(pattern for pattern in self.patterns if pattern is not None)
        return {
            pattern: self.values[:, [own == pattern for own in self.patterns]].sum(1)
            for pattern in stated
        }

    @property
    def total(self) -> np.ndarray:
        """The derivative when every stated l2 rises alike, ``[q]``."""
        total: np.ndarray = self.values[:, [own is not None for own in self.patterns]].sum(1)
        return total

    def table(self) -> Table:
        """One row per query: the total, then every block."""
        by_block = dict(zip(self.blocks, self.values.T, strict=True))
        return Table(
            {"query": self.query_ids, "total": self.total, **by_block},
            f"Derivative of {self.meaning.measure} in l2 ({self.meaning.unit} per unit of l2).",
        )

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@final
@dataclass(frozen=True)
class Sweep:
    """Scores of the same queries at several dampings.

    Attributes:
        scores: by damping, in the order asked.
        refused: dampings that give no answer, with the reason.
    """

    scores: Mapping[float, Scores]
    refused: Mapping[float, str]

    def __getitem__(self, damping: float) -> Scores:
        return self.scores[damping]

    @property
    def dampings(self) -> tuple[float, ...]:
        """Those that have scores."""
        return tuple(self.scores)

    def _agreement(self) -> list[float]:
        """Mean correlation of each query's scores with those at the damping before."""
        found, before = [], None
        for scores in self.scores.values():
            rows = np.asarray(scores.values, np.float64)
            rows = rows - rows.mean(1, keepdims=True)
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
            found.append(np.nan if before is None else float((rows * before).sum(1).mean()))
            before = rows
        return found

    def table(self) -> Table:
        """One row per damping: how large scores are, and how much the order still changes.

        Where correlation with the damping before stays near 1, the answer does not hang on it.
        """
        kept = list(self.scores.values())
        columns = {
            "damping": np.array(list(self.scores)),
            "mean_size": np.array([float(np.abs(s.values).mean()) for s in kept]),
            "correlation_with_previous": np.array(self._agreement()),
            "worst_residual": np.array([_worst(s.provenance.residual) for s in kept]),
        }
        unit = kept[0].meaning.score_unit
        refused = "".join(f" Refused at {value:g}." for value in self.refused)
        return Table(columns, f"Scores by damping; sizes in {unit}.{refused}")

    def plot(self, axes: Any = None) -> Any:
        """Size of the scores and agreement of neighbours over damping; matplotlib's Axes."""
        if axes is None:
            axes = require("matplotlib.pyplot", "plot()").subplots(figsize=(6, 4))[1]
        table = self.table()
        size = table["mean_size"] / max(float(table["mean_size"].max()), 1e-300)
        axes.plot(table["damping"], size, marker="o", label="mean size (largest = 1)")
        agreement = table["correlation_with_previous"]
        axes.plot(table["damping"], agreement, marker="s", label="correlation with previous")
        axes.set(xscale="symlog" if 0 in self.scores else "log", xlabel="damping")
        axes.legend()
        return axes

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _worst(residual: np.ndarray) -> float:
    known = residual[np.isfinite(residual)]
    return float(known.max()) if len(known) else np.nan
