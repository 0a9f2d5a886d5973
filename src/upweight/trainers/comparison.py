"""The objective and a training loss on the same rows: do they agree, and if not, why."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from upweight.errors import InputError, LossError
from upweight.risk import Risk
from upweight.sources import leaves
from upweight.tables import Table
from upweight.trainers.solved import solved
from upweight.trainers.terms import Case, Hypothesis, other_terms
from upweight.trainers.theirs import gradient_of, number, training
from upweight.trainers.untouched import untouched

__all__ = ["Comparison", "compare"]

# Of values. Gradients cancel, so theirs is a hundred times that.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
HALF_TOLERANCE, GRADIENT_FACTOR = 1e-2, 100.0


@final
@dataclass(frozen=True)
class Comparison:
    """The objective's mean loss and a user's training loss on the same batches.

    Attributes:
        rows: examples of each batch.
        ours: Σ w_i ℓ_i / Σ w_i of each batch ``[batches]``, without L2.
        l2: ½ Σ λ_b ‖θ_b‖², as the objective states it.
        theirs: the training loss ``[batches]``.
        cosines: of both gradients in the chosen parameters ``[batches]``.
        ratios: size of their gradient over ours ``[batches]``.
        agrees: whether influence of the objective is influence of what was trained.
        explanation: in what they agree, or what the training loss is instead, with the fix.

    Example:
        >>> from upweight import Data, Objective
        >>> model, (x, y) = torch.nn.Linear(3, 2), (torch.randn(20, 3), torch.arange(20) % 2)
        >>> risk = Risk(Objective(model, "cross_entropy"), Data.of((x, y)))
        >>> compare(risk, torch.nn.CrossEntropyLoss()).agrees
        True
    """

    rows: tuple[int, ...]
    ours: np.ndarray
    l2: float
    theirs: np.ndarray
    cosines: np.ndarray
    ratios: np.ndarray
    agrees: bool
    explanation: str

    def table(self) -> Table:
        """Both losses batch by batch."""
        columns = {
            "rows": list(self.rows),
            "ours": self.ours,
            "L2": np.full(len(self.rows), self.l2),
            "theirs": self.theirs,
            "gradient cosine": self.cosines,
            "gradient ratio": self.ratios,
        }
        return Table(columns, self.explanation)

    def require(self) -> None:
        """Raise unless they agree.

        Raises:
            LossError: they do not; the message is the explanation.
        """
        if not self.agrees:
            raise LossError(self.explanation)

    def __repr__(self) -> str:
        return repr(self.table())


@final
class _Close:
    """Equality of losses and of their gradients to rounding."""

    def __init__(self, dtype: torch.dtype, outputs: list[Any]) -> None:
        self.relative = TOLERANCES.get(dtype, HALF_TOLERANCE)
        largest = max(
            (
                float(leaf.detach().abs().max())
                for leaf in leaves(outputs)
                if leaf.is_floating_point() and leaf.numel()
            ),
            default=1.0,
        )
        self.slack = 4 * torch.finfo(dtype).eps * largest

    def values(self, a: float, b: float, loose: float = 1.0) -> bool:
        return abs(a - b) <= loose * self.relative * max(abs(a), abs(b)) + self.slack

    def gradients(self, a: Tensor, b: Tensor, loss: float, loose: float = 1.0) -> bool:
        size = float(max(a.norm(), b.norm()))
        relative = loose * GRADIENT_FACTOR * self.relative + 10 * self.slack / max(
            abs(loss), 1e-300
        )
        return float((a - b).norm()) <= min(relative, 0.1) * size


@final
@dataclass(frozen=True)
class _Both:
    """Everything the verdict rests on."""

    risk: Risk
    name: str
    cases: list[Case]
    close: _Close

    def l2(self) -> float:
        objective = self.risk.objective
        row = objective.space.row().double()
        return 0.5 * float((objective.l2.double() * row * row).sum())

    def slopes(self) -> list[Tensor]:
        """Gradients ``[p]`` of our mean loss, without L2."""
        return [gradient_of(case.ours(), self.risk.objective.space) for case in self.cases]

    def fits(self, hypothesis: Hypothesis) -> bool:
        """Whether it gives their values and their gradients on every batch."""
        for case in self.cases:
            value = hypothesis.value(case)
            if not self.close.values(number(value), case.theirs, hypothesis.loose):
                return False
        return all(
            self.close.gradients(
                gradient_of(hypothesis.value(case), self.risk.objective.space),
                case.slope,
                case.theirs,
                hypothesis.loose,
            )
            for case in self.cases
        )


def _positions(risk: Risk, batches: int, rows: int) -> Iterator[Tensor]:
    """Rows ``[b]`` of each batch, drawn once for all; batches differ in size.

    The size tells a factor from the number of rows.
    """
    count = len(risk.data)
    if risk.data.batch_size is not None:
        rows = min(rows, risk.data.batch_size)
    rows = min(rows, count)
    order = torch.randperm(count, generator=torch.Generator(device="cpu").manual_seed(0))
    start, step = 0, max(1, rows // 4)
    for index in range(batches):
        size = max(1, rows - index * step)
        yield order[(start + torch.arange(size, device="cpu")) % count]
        start += size


def _case(risk: Risk, positions: Tensor, value: float, slope: Tensor) -> Case:
    objective = risk.objective
    batch, _ = risk.at(positions)
    with torch.enable_grad():
        outputs = objective.outputs(objective.space.parameters(), batch)
        losses = objective.loss(outputs, batch.targets)
    weights = risk.weights[positions].to(losses)
    if not float(weights.sum()) > 0:
        raise LossError(
            f"A batch of {len(positions)} rows has no weight: all its targets are ignored, or its "
            "weights are 0. Compare more rows: rows=64."
        )
    stated = risk.data.weights
    sample = torch.ones_like(weights) if stated is None else stated[positions].to(losses)
    return Case(objective.loss, batch, outputs, losses, weights, sample, value, slope)


def _agreement(both: _Both) -> str | None:
    """In what they agree, if they do."""
    l2, slopes = both.l2(), both.slopes()
    row = both.risk.objective.l2 * both.risk.objective.space.row()
    gaps = [case.theirs - number(case.ours()) for case in both.cases]
    scaled = list(zip(both.cases, slopes, strict=True))
    with_l2 = l2 > 0 and all(
        both.close.values(number(case.ours()) + l2, case.theirs)
        and both.close.gradients(slope + row, case.slope, case.theirs)
        for case, slope in scaled
    )
    if with_l2:
        return "The training loss is the objective, its L2 term included."
    if not all(both.close.gradients(s, case.slope, case.theirs) for case, s in scaled):
        return None
    if all(both.close.values(number(case.ours()), case.theirs) for case in both.cases):
        decay = "; its L2 term is the optimiser's weight decay to have applied" if l2 > 0 else ""
        return f"The training loss is the mean loss of the objective{decay}."
    # A factor this near 1 is not to be seen in gradients, which are compared less strictly.
    seen = 2 * GRADIENT_FACTOR * both.close.relative
    if any(abs(gap) <= seen * abs(c.theirs) for gap, c in zip(gaps, both.cases, strict=True)):
        return None
    shown = ", ".join(f"{gap:+.6g}" for gap in gaps)
    same = all(both.close.values(gap, gaps[0], 10.0) for gap in gaps)
    what = "a constant" if same else "a number per batch that the parameters do not move"
    return (
        f"Harmless: the training loss differs by {what} ({shown} on these batches) and its "
        "gradient is the objective's, so that influence is the same."
    )


def _hidden(both: _Both) -> str | None:
    """Equal values with other gradients: something is detached or frozen."""
    for extra in {0.0, both.l2()}:
        if all(both.close.values(number(c.ours()) + extra, c.theirs) for c in both.cases):
            break
    else:
        return None
    space = both.risk.objective.space
    reached = space.unflatten(torch.stack([case.slope for case in both.cases]).abs().sum(0))
    ours = space.unflatten(torch.stack(both.slopes()).abs().sum(0))
    missing = [
        name for name in reached if bool((reached[name] == 0).all() & (ours[name] != 0).any())
    ]
    where = f" No gradient reaches {', '.join(missing[:5])}." if missing else ""
    return (
        f"The training loss ({both.name}) has the objective's value and another gradient: a part "
        f"of it is detached, frozen or straight-through.{where} Training followed that gradient: "
        "choose the parameters that it moved (parameters=), or remove the detach."
    )


def _verdict(both: _Both) -> tuple[bool, str]:
    if (found := _agreement(both)) is not None:
        return True, found
    if (hidden := _hidden(both)) is not None:
        return False, hidden
    objective = both.risk.objective
    for group in (other_terms(both.cases), solved(both.cases, objective)):
        for hypothesis in group:
            if both.fits(hypothesis):
                return False, f"The training loss ({both.name}) {hypothesis.words}"
    shown = "; ".join(
        f"{case.theirs:.6g} where the objective has {number(case.ours()):.6g}"
        for case in both.cases
    )
    return False, (
        f"The training loss ({both.name}) is not the objective's, and nothing tried explains it "
        f"(another average, labels, smoothing, weights, L2, a factor): it is {shown}. Pass the "
        "training loss itself per example, loss=callable returning [n]."
    )


def _angles(both: _Both) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and ratios ``[batches]`` of their gradients with ours."""
    cosines, ratios = [], []
    for case, slope in zip(both.cases, both.slopes(), strict=True):
        a, b = case.slope.double(), slope.double()
        sizes = float(a.norm()), float(b.norm())
        product = sizes[0] * sizes[1]
        cosines.append(float(a @ b) / product if product else float("nan"))
        ratios.append(sizes[0] / sizes[1] if sizes[1] else float("nan"))
    return np.array(cosines), np.array(ratios)


def compare(risk: Risk, training_loss: object, *, batches: int = 2, rows: int = 16) -> Comparison:
    """Is the objective, Σ w_i ℓ_i / Σ w_i + ½ Σ λ_b ‖θ_b‖², the loss that was trained with?

    Both are evaluated on the same batches, in the model's present mode, with their gradients in
    the chosen parameters. Where they differ, the usual reasons are computed and compared, and the
    one that gives the same values and gradients on every batch is named. The model, its gradients
    and the random states are as before afterwards, also after an exception.

    Args:
        risk: the objective over its training data.
        training_loss: a torch criterion (outputs, targets) -> scalar, a function (model, batch) ->
            scalar where a batch is what the data's loader yields, a Hugging Face Trainer whose
            training set has the data's rows in the data's order, or a LightningModule.
        batches: how many to compare.
        rows: of the largest batch, at most the data's batch size; others are smaller.

    Returns:
        Both losses, and what was found.

    Raises:
        LossError: the training loss is none of these, fails, gives no scalar, is random, changes
            the model, or is too small to tell anything.
        ModelError: it trains another module, or one with random layers in train mode.
        NonFiniteError: NaN or infinity.

    Example:
        >>> from upweight import Data, Objective
        >>> model, (x, y) = torch.nn.Linear(3, 2), (torch.randn(20, 3), torch.arange(20) % 2)
        >>> risk = Risk(Objective(model, "cross_entropy"), Data.of((x, y)))
        >>> found = compare(risk, torch.nn.CrossEntropyLoss(reduction="sum"))
        >>> found.agrees, "the sum over the batch" in found.explanation
        (False, True)
    """
    for name, value in (("batches", batches), ("rows", rows)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}.")
    theirs = training(training_loss, risk)
    places = list(_positions(risk, batches, rows))
    # First all of theirs: what it does to the model in passing must not meet a graph of ours.
    found = [theirs.at(positions, risk.objective.space) for positions in places]
    with untouched(theirs.modules):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        again, _ = theirs.at(places[0], risk.objective.space)
    cases = [_case(risk, places[i], *found[i]) for i in range(batches)]
    close = _Close(risk.objective.space.dtype, [case.outputs for case in cases])
    if not close.values(again, cases[0].theirs):
        raise LossError(
            f"The training loss ({theirs.name}) is random: {cases[0].theirs:.6g} and {again:.6g} "
            "on the same rows. Switch noise, augmentation and functional dropout off for this."
        )
    both = _Both(risk, theirs.name, cases, close)
    if max(max(abs(case.theirs), abs(number(case.ours()))) for case in cases) <= 10 * close.slack:
        raise LossError(
            f"Both losses are at most {10 * close.slack:.2g}, within rounding of 0, and equal to "
            "nearly anything. Compare before training, or a model in float64."
        )
    agrees, explanation = _verdict(both)
    cosines, ratios = _angles(both)
    return Comparison(
        rows=tuple(len(positions) for positions in places),
        ours=np.array([number(case.ours()) for case in cases]),
        l2=both.l2(),
        theirs=np.array([case.theirs for case in cases]),
        cosines=cosines,
        ratios=ratios,
        agrees=agrees,
        explanation=explanation,
    )
