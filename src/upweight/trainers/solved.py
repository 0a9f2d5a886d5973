"""Hypotheses with an unknown number: a factor, λ, ε, class weights. Solved for, then checked.

A loss that is linear in its unknown, A + t(B − A), is solved on all batches at once by least
squares of the values. λ and class weights are solved from gradients, which know the direction of
every part. Nothing is believed because it was solved: values and gradients of all batches decide.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from upweight.losses import BinaryCrossEntropy, CrossEntropy
from upweight.objective import Objective
from upweight.trainers.terms import MOST_LABELS, Case, Hypothesis, plain_terms
from upweight.trainers.theirs import gradient_of, number

__all__ = ["solved"]

Value = Callable[[Case], Tensor]


def _line(cases: list[Case], low: Value, high: Value) -> tuple[float, Value] | None:
    """T of low + t(high − low) by least squares, and that loss."""
    ends = [(number(low(case)), number(high(case))) for case in cases]
    square = sum((b - a) ** 2 for a, b in ends)
    if not 0 < square < float("inf"):
        return None
    residual = zip(cases, ends, strict=True)
    t = sum((case.theirs - a) * (b - a) for case, (a, b) in residual) / square
    return t, lambda case: low(case) + t * (high(case) - low(case))


def _factor(cases: list[Case]) -> Iterator[Hypothesis]:
    found = _line(cases, lambda case: 0.0 * case.ours(), Case.ours)
    if found is None or not found[0] > 0:
        return
    k, value = found
    inverse = round(1 / k)
    steps = inverse > 1 and abs(k * inverse - 1) < 1e-3
    origin = (
        f" (1/{inverse}, as with gradient accumulation over {inverse} batches)" if steps else ""
    )
    yield Hypothesis(
        f"is {k:.6g} times the objective's{origin}. A factor of the loss is no fault, but its L2 "
        f"then weighs {1 / k:.6g} times as much: state l2=λ/{k:.6g} for a weight decay of λ; where "
        "accumulated batches are added up again, λ is right as it is",
        value,
        loose=10.0,
    )


def _smoothing(cases: list[Case]) -> Iterator[Hypothesis]:
    loss = cases[0].loss
    if not isinstance(loss, CrossEntropy) or loss.weight is not None:
        return

    def at(epsilon: float) -> Value:
        other = CrossEntropy(label_smoothing=epsilon, ignore_index=loss.ignore_index)

        def value(case: Case) -> Tensor:
            return replace(case, losses=other(case.outputs, case.batch.targets)).ours()

        return value

    found = _line(cases, at(0.0), at(1.0))
    if found is None or not -1e-6 <= found[0] <= 1:
        return
    epsilon = max(0.0, round(found[0], 6))
    yield Hypothesis(
        f"has label smoothing ε = {epsilon:.6g}, and the objective {loss.label_smoothing:g}. Pass "
        f"loss=nn.CrossEntropyLoss(label_smoothing={epsilon:.6g})",
        found[1],
        loose=10.0,
    )


def _positive(cases: list[Case]) -> Iterator[Hypothesis]:
    loss = cases[0].loss
    if not isinstance(loss, BinaryCrossEntropy):
        return

    def at(weight: float) -> Value:
        def value(case: Case) -> Tensor:
            other = BinaryCrossEntropy(pos_weight=torch.tensor(weight, device=case.losses.device))
            return replace(case, losses=other(case.outputs, case.batch.targets)).ours()

        return value

    found = _line(cases, at(0.0), at(1.0))
    if found is not None and found[0] > 0:
        stated = "none" if loss.pos_weight is None else f"{loss.pos_weight.tolist()}"
        yield Hypothesis(
            f"has pos_weight {found[0]:.6g}, and the objective {stated}. Pass "
            f"loss=nn.BCEWithLogitsLoss(pos_weight=torch.tensor({found[0]:.6g}))",
            found[1],
            loose=10.0,
        )


def _decay(cases: list[Case], objective: Objective) -> Iterator[Hypothesis]:
    """½ Σ λ_b ‖θ_b‖², from what the gradients differ by."""
    space = objective.space
    gap = torch.stack([c.slope - gradient_of(c.ours(), objective.space) for c in cases]).mean(0)
    size, found = float(gap.norm()), {}
    blocks, stated = space.unflatten(gap.double()), space.unflatten(objective.l2)
    for name, theta in space.values().items():
        square = float((theta.double() ** 2).sum())
        strength = 0.0 if square == 0 else float((blocks[name] * theta).sum()) / square
        found[name] = strength if abs(strength) * square**0.5 > 1e-4 * size else 0.0
    if not any(found.values()) or any(strength < 0 for strength in found.values()):
        return

    def value(case: Case) -> Tensor:
        parts = [found[name] * (p * p).sum() for name, p in space.parameters().items()]
        return case.ours() + 0.5 * torch.stack(parts).sum()

    one = max(found.values())
    alike = all(abs(strength - one) <= 1e-3 * one for strength in found.values())
    each = {name: float(f"{strength:.5g}") for name, strength in found.items() if strength}
    setting = f"{one:.5g}" if alike else repr(each)
    now = {name: float(row.mean()) for name, row in stated.items()}
    states = "states none" if not any(now.values()) else f"states {_short(now)}"
    yield Hypothesis(
        f"contains the L2 term ½λ‖θ‖² with λ = {setting}, and the objective {states}. State "
        f"l2={setting}, beside what the optimiser decays",
        value,
        loose=100.0,
    )


def _short(values: dict[str, float]) -> str:
    return f"{next(iter(values.values())):.5g}" if len(set(values.values())) == 1 else repr(values)


def _by_class(case: Case, objective: Objective) -> dict[int, float] | None:
    """What each label's losses are multiplied by in their loss of a batch."""
    terms = plain_terms(case)
    if terms.labels is None:
        return None
    weight = terms.counted * terms.sample
    labels = terms.labels[weight.expand_as(terms.each) > 0].unique().tolist()
    if not 1 < len(labels) <= MOST_LABELS or len(labels) > objective.space.size:
        return None
    sums = [(terms.each * weight * (terms.labels == label)).sum() for label in labels]
    columns = torch.stack([gradient_of(part, objective.space) for part in sums], 1).double()
    # Scaled columns: a class of one row counts as much as one of many.
    size = columns.norm(dim=0).clamp_min(1e-300)
    basis, kept, right = torch.linalg.svd(columns / size, full_matrices=False)
    if float(kept[-1]) < 1e-5 * float(kept[0]):
        return None
    solution = right.T @ ((basis.T @ case.slope.double()) / kept) / size
    return dict(zip(labels, solution.tolist(), strict=True))


def _classes(cases: list[Case], objective: Objective) -> Iterator[Hypothesis]:
    """Class weights, from per-class gradients."""
    found = [_by_class(case, objective) for case in cases]
    solved = [part for part in found if part is not None]
    if len(solved) < len(cases):
        return
    rows = [float((plain_terms(c).counted * plain_terms(c).sample).sum()) for c in cases]
    first = {label: k * rows[0] for label, k in solved[0].items()}
    for divided in (True, False):
        weights = dict(first)
        for part, count in zip(solved[1:], rows[1:], strict=True):
            common = [label for label in part if label in weights]
            scale = count
            total = sum(part[label] for label in common)
            if divided and total:  # each batch has its own Σ w
                scale = sum(weights[label] for label in common) / total
            weights |= {label: part[label] * scale for label in part if label not in weights}
        yield _weighted(weights, divided)


def _weighted(weights: dict[int, float], divided: bool) -> Hypothesis:
    def value(case: Case) -> Tensor:
        terms = plain_terms(case)
        if terms.labels is None:
            return torch.full((), torch.nan)
        known = torch.zeros_like(terms.each)
        for label, weight in weights.items():
            known = torch.where(terms.labels == label, weight, known)
        counted = terms.counted * terms.sample
        total = (known if divided else 1.0) * counted
        # Solved weights may sum to 0, which is no explanation: NaN equals nothing.
        return (terms.each * known * counted).sum() / total.sum()

    shown = {label: float(f"{weight:.4g}") for label, weight in sorted(weights.items())}
    if divided:
        smallest = min((w for w in weights.values() if w > 0), default=1.0)
        shown = {label: float(f"{w / smallest:.4g}") for label, w in sorted(weights.items())}
        tail = "up to one factor. Pass loss=nn.CrossEntropyLoss(weight=...), the criterion itself"
    else:
        tail = (
            "and divides by the number of rows, not by the sum of the weights. Pass nn."
            "CrossEntropyLoss(weight=...), and multiply l2 by N / Σ w"
        )
    return Hypothesis(f"has other class weights than the objective: {shown}, {tail}", value, 100.0)


def solved(cases: list[Case], objective: Objective) -> Iterator[Hypothesis]:
    """Every hypothesis with an unknown number, the simplest first."""
    found = (
        *_smoothing(cases),
        *_positive(cases),
        *_factor(cases),
        *_decay(cases, objective),
        *_classes(cases, objective),
    )
    for hypothesis in found:
        yield replace(hypothesis, words=f"{hypothesis.words}.")
