"""Attacks on the training set, to study how vulnerable one's own model is, and their verification.

Some training inputs are changed a little, by less than a person or a file sees, so that the model
trained on them errs on chosen queries (Koh & Liang, 2017, section 5.2). The model is a head on the
features of a frozen extractor; the attack goes through both. ``Influence.audit`` is the defence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from upweight.bars import track
from upweight.checks import probe
from upweight.curvature import curvature
from upweight.data import Batch, Data
from upweight.engine import query_rows
from upweight.errors import DataError, InputError, NotConvergedError
from upweight.evaluation import Edit, refit
from upweight.front import Influence
from upweight.gradients import mixed_derivative, stacked_gradient
from upweight.linalg import Cholesky, Inverse
from upweight.refusals import refuse_train_mode
from upweight.risk import Risk
from upweight.tables import Table

__all__ = ["Attempt", "Box", "Outcome", "attack", "retrained", "vulnerability"]

RTOL, MOST_STEPS = 1e-6, 2000
SAME_FEATURES = 1e-3
EXAMPLES, QUERIES = 256, 32


@final
@dataclass(frozen=True)
class Box:
    """How far inputs may move, and how fast.

    Attributes:
        radius: largest change of each number of an input.
        step: change of each number in one round.
        low: least value an input may have.
        high: largest value.
    """

    radius: float
    step: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 < self.step <= self.radius and self.low < self.high):
            raise InputError(f"A box needs 0 < step ≤ radius and low < high, got {self}.")

    def clip(self, moved: Tensor, origin: Tensor) -> Tensor:
        """Inputs brought back into the box around where they came from."""
        inside = torch.clamp(moved, origin - self.radius, origin + self.radius)
        return inside.clamp(self.low, self.high)


@final
@dataclass(frozen=True)
class Attempt:
    """Training examples to change, and queries to harm.

    Attributes:
        ids: of the training examples, ``[m]``.
        inputs: what the extractor takes for them, ``[m, ...]``.
        queries: the head's inputs (features) and targets of what shall go wrong.
    """

    ids: Sequence[Any]
    inputs: Tensor
    queries: Any


@final
@dataclass(frozen=True)
class Outcome:
    """What a changed training set does to the queries, after really training on it.

    Attributes:
        ids: changed training examples, ``[m]``.
        inputs: theirs now, ``[m, ...]``.
        features: theirs now, ``[m, d]``.
        loss: of each query, ``[q]``, in the loss's unit.
        wrong: whether each query is misclassified, ``[q]``.
        rounds: steps taken.
        row: parameters of the head, ``[p]``.
    """

    ids: tuple[Any, ...]
    inputs: Tensor
    features: Tensor
    loss: np.ndarray
    wrong: np.ndarray
    rounds: int
    row: Tensor


@final
@dataclass
class _Trial:
    """An attempt under way."""

    attempt: Attempt
    positions: Tensor
    targets: Tensor
    batch: Batch
    inputs: Tensor
    row: Tensor
    outcome: Outcome | None = None
    rounds: int = 0

    @property
    def done(self) -> bool:
        """Whether all queries are wrong."""
        return self.outcome is not None and bool(self.outcome.wrong.all())

    def step(self, slope: Tensor, box: Box) -> None:
        """Move every number along the sign of the slope, inside the box around the original."""
        self.inputs = box.clip(self.inputs + box.step * slope.sign(), self.attempt.inputs)
        self.rounds += 1

    def result(self) -> Outcome:
        """What came out."""
        assert self.outcome is not None
        return self.outcome


@final
class _Bench:
    """The head in float64, ready to be retrained on changed examples."""

    def __init__(self, inf: Influence, extractor: nn.Module) -> None:
        refuse_train_mode(extractor)
        self.extractor, self.data = extractor, inf.data
        self.risk = Risk(inf.objective.in_double(), inf.data)
        self.objective = self.risk.objective
        self.inverse: Inverse = Cholesky().init(curvature("hessian", self.risk))
        if float(self.risk.gradient().norm()) > 1e-3 * (
            1 + float(self.objective.space.row().norm())
        ):
            raise NotConvergedError(
                "The head is not at a minimum of its objective, so a retraining would move it "
                "without any attack. Train it to the end and state its l2."
            )  # fmt: skip

    def trial(self, attempt: Attempt) -> _Trial:
        """An attempt with its examples looked up."""
        positions = self.data.positions(attempt.ids)
        if not attempt.inputs.is_floating_point():
            raise InputError(
                f"The inputs are {attempt.inputs.dtype}, which cannot move a little. Give them as "
                "floating numbers, levels of 8 bits as .float()."
            )
        if len(attempt.inputs) != len(positions) or len(positions.unique()) < len(positions):
            raise DataError(
                f"{len(attempt.inputs)} inputs for the ids {list(attempt.ids)}: give one input for "
                "each id, and each id once."
            )
        here, _ = self.risk.at(positions)
        queries = Data.of(attempt.queries)
        probe(self.objective, queries, role="queries")
        start = self.objective.space.row()
        batch = self.objective.place(queries.rows())
        return _Trial(attempt, positions, here.targets, batch, attempt.inputs.detach(), start)

    def require_same(self, trials: Sequence[_Trial]) -> None:
        """Refuse an extractor that does not give the features the head was trained on."""
        with torch.no_grad():
            for trial in trials[:4]:
                found = self.extractor(trial.inputs)
                known = self._features(trial.positions).to(found)
                if not torch.allclose(
                    found, known, rtol=0.0, atol=SAME_FEATURES * float(known.abs().max())
                ):
                    raise InputError(
                        f"extractor(inputs) of {list(trial.attempt.ids)[:3]} differs from the "
                        "features the head was trained on. Give the very extractor, in eval mode, "
                        "and the inputs as it saw them."
                    )  # fmt: skip

    def _features(self, positions: Tensor) -> Tensor:
        """What the head was trained on, ``[m, d]``."""
        inputs = self.risk.at(positions)[0].inputs
        if not isinstance(inputs, tuple) or len(inputs) != 1:
            raise InputError("The head of an attack takes one tensor of features.")
        found: Tensor = inputs[0]
        return found

    def retrain(self, trials: Sequence[_Trial], features: Sequence[Tensor]) -> None:
        """Refit the head on the changed examples of each trial, and note what came out."""
        edits = [
            Edit(trial.positions, (f.detach(),), trial.targets)
            for trial, f in zip(trials, features, strict=True)
        ]
        start = torch.stack([trial.row for trial in trials])
        fits = refit(self.risk, self.inverse, edits, start=start, rtol=RTOL, max_steps=MOST_STEPS)
        for trial, row, f in zip(trials, fits.rows, features, strict=True):
            trial.row = row
            params = self.objective.space.unflatten(row)
            with torch.no_grad():
                outputs = self.objective.outputs(params, trial.batch)
                loss = self.objective.loss(outputs, trial.batch.targets)
                predicted = self.objective.loss.predict(outputs)
            if predicted is None:
                raise InputError("The loss has no classes, so nothing can be misclassified.")
            trial.outcome = Outcome(
                tuple(trial.attempt.ids),
                trial.inputs,
                f.detach(),
                loss.cpu().numpy(),
                (predicted != trial.batch.targets.reshape(predicted.shape)).cpu().numpy(),
                trial.rounds,
                row,
            )

    def ascent(self, trial: _Trial, features: Tensor) -> Tensor:
        """Derivative of the queries' mean loss in the changed features, ``[m, d]``, times n."""
        count = len(trial.batch)
        even = trial.row.new_full((1, count), 1 / count)
        slope = stacked_gradient(self.objective, trial.batch, trial.row[None], even)
        rows = self.inverse.apply(slope)
        put = self.objective.place(Batch((features.detach(),), trial.targets, trial.positions))
        return -mixed_derivative(self.objective, put, rows, at=trial.row)[0]


def attack(
    inf: Influence,
    extractor: nn.Module,
    attempts: Sequence[Attempt],
    *,
    box: Box,
    rounds: int = 100,
) -> list[Outcome]:
    """Change training inputs inside a box until the retrained head errs on the queries.

    Each round moves every number of the inputs by x ← x + step · sign(I_pert,loss), clipped to the
    box, where I_pert,loss = −∇m H⁻¹ ∇_x∇_θ ℓ goes through the extractor to its inputs; then the
    head is really retrained and asked. An attempt ends when all its queries are wrong.

    Args:
        inf: of the head on the features of the training data; at its minimum.
        extractor: frozen; from inputs ``[m, ...]`` to features ``[m, d]``.
        attempts: all advance together.
        box: how far and how fast.
        rounds: at most.

    Raises:
        InputError: the extractor does not give the head's features, or the inputs are integers.
        ModelError: the extractor is in train mode and random or batch-coupled there.
        NotConvergedError: the head is not at its minimum, or a retraining failed.

    ∇m and ∇_x∇_θ ℓ are those of the retrained head, H (dense, in float64) is that of the clean
    one; m is the mean loss of the attempt's queries. Source: Koh & Liang (2017), section 5.2.

    Example:
        >>> x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
        >>> y = (x[:, 0] > 0).double()
        >>> head = nn.Linear(5, 1, bias=False).double()
        >>> optimiser = torch.optim.LBFGS(head.parameters(), max_iter=100, tolerance_grad=1e-9)
        >>> def closure():
        ...     optimiser.zero_grad()
        ...     loss = nn.functional.binary_cross_entropy_with_logits(head(x)[:, 0], y)
        ...     loss = loss + 0.005 * head.weight.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimiser.step(closure)
        >>> inf = Influence(head, (x, y), loss="binary_cross_entropy", l2=0.01)
        >>> box = Box(radius=1.0, step=0.1, low=-9, high=9)
        >>> attempt = Attempt([3], x[[3]], (x[:1], y[:1]))
        >>> attack(inf, nn.Identity(), [attempt], box=box, rounds=3)[0].rounds
        3
    """
    bench = _Bench(inf, extractor)
    trials = [bench.trial(attempt) for attempt in attempts]
    bench.require_same(trials)
    for turn in track(range(rounds + 1), "attack", rounds + 1):
        under_way = [trial for trial in trials if not trial.done]
        if not under_way:
            break
        x = torch.cat([trial.inputs for trial in under_way]).requires_grad_(True)
        with torch.enable_grad():
            flat = extractor(x)
        features = flat.split([len(trial.inputs) for trial in under_way])
        bench.retrain(under_way, features)
        if turn == rounds or all(trial.done for trial in under_way):
            continue
        pull = [bench.ascent(trial, f) for trial, f in zip(under_way, features, strict=True)]
        (slope,) = torch.autograd.grad(flat, x, torch.cat(pull).to(flat))
        for trial, part in zip(under_way, slope.split([len(f) for f in features]), strict=True):
            if not trial.done:
                trial.step(part, box)
    return [trial.result() for trial in trials]


def retrained(inf: Influence, extractor: nn.Module, attempts: Sequence[Attempt]) -> list[Outcome]:
    """What the queries become when the head is really trained on given inputs.

    The strict check of an attack: pass its inputs as a file would store them (rounded to 8 bits).

    Args:
        inf: of the clean head, as in ``attack``.
        extractor: as in ``attack``.
        attempts: with the inputs to train on.

    Raises:
        NotConvergedError: the head is not at its minimum, or a retraining failed.
    """
    bench = _Bench(inf, extractor)
    trials = [bench.trial(attempt) for attempt in attempts]
    with torch.no_grad():
        bench.retrain(trials, [extractor(trial.inputs) for trial in trials])
    return [trial.result() for trial in trials]


def vulnerability(inf: Influence, queries: Any) -> Table:
    """Training examples by how much a small change of their inputs could move the queries.

    The mean over queries of ‖(1/n) I_pert,loss‖₁, in units of the measure per unit of every input:
    where an attack would aim, and what to watch. Largest first.

    Args:
        inf: of a model or of its head.
        queries: what must not change.

    Raises:
        InputError: the inputs are integers.

    Example:
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> inf = Influence(nn.Linear(3, 2), (x, y), loss="cross_entropy", l2=0.1)
        >>> list(vulnerability(inf, (x[:2], y[:2])).columns)
        ['train', 'vulnerability']
    """
    objective, data = inf.objective, Data.of(queries)
    rows = inf.inverse.solve(query_rows(objective, data, objective.measure)).require()
    parts = []
    for batch, share in track(inf.risk.batches(EXAMPLES), "vulnerability"):
        total = torch.zeros_like(share)
        for some in rows.split(QUERIES):
            mixed = mixed_derivative(objective, batch, some)
            total += mixed.abs().flatten(2).sum((0, 2))
        parts.append(share * total / len(rows))
    values = torch.cat(parts).cpu().double().numpy()
    order = np.argsort(-values, kind="stable")
    caption = f"Change of {objective.measure} per unit change of all inputs: mean of ‖I_pert/n‖₁"
    return Table({"train": inf.data.ids[order], "vulnerability": values[order]}, caption)
