"""The hospital model of section 5.3: data before and after the change, optima, and proofs.

The parts of section 5.3; ``sec53_hospital`` puts them together.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_expit

import upweight as uw
from reproduce.datasets import hospital
from reproduce.minima import linear

__all__ = [
    "HIDDEN", "RELABELLED", "REMOVED", "Settings", "Wards", "carriers", "explain", "gradient",
    "influence", "load", "optimum", "prove", "query_of", "stopped_early",
]  # fmt: skip

REMOVED, RELABELLED, HIDDEN = "removed", "relabelled", "child indicator set to 0"


@dataclass(frozen=True)
class Settings:
    """``others`` influential and ``random`` examples are changed beside the four children."""

    l2: float = 1e-4
    test_child: int = 1742
    others: int = 6
    random: int = 10
    seed: int = 0
    cap: int = 1000
    iterations: int = 4000


@dataclass(frozen=True)
class Wards:
    """Training data before and after the change, test data, and the child's column."""

    before: tuple[np.ndarray, np.ndarray]
    after: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    names: tuple[str, ...]
    child: int

    def verdict(self, row: np.ndarray) -> dict[str, Any]:
        """Test children on the wrong side, accuracy, coefficients larger than the child's."""
        x, y = self.test
        wrong = (x @ row > 0) != (y == 1)
        size = np.abs(row)
        return {
            "wrong_children": int(wrong[x[:, self.child] == 1].sum()),
            "test_accuracy": float(1 - wrong.mean()),
            "child_coefficient": float(row[self.child]),
            "larger_coefficients": int((size > size[self.child]).sum()),
            "largest": self.names[int(size.argmax())],
            "largest_coefficient": float(row[size.argmax()]),
        }


def load() -> Wards:
    """All children who were not readmitted leave but the last, as in 2017."""
    data = hospital()
    x, y, child = data.train_x, data.train_y, data.child
    gone = np.flatnonzero((x[:, child] == 1) & (y == 0))[:-1]
    kept = np.delete(np.arange(len(y)), gone)
    return Wards((x, y), (x[kept], y[kept]), (data.test_x, data.test_y), data.names, child)


def gradient(row: np.ndarray, data: tuple[np.ndarray, np.ndarray], l2: float) -> np.ndarray:
    x, y = data
    return x.T @ (expit(x @ row) - y) / len(y) + l2 * row


def optimum(
    data: tuple[np.ndarray, np.ndarray], l2: float, start: np.ndarray | None = None
) -> np.ndarray:
    """The minimiser by Newton's method, which unscaled features do not slow down."""
    x, y = data
    row = np.zeros(x.shape[1]) if start is None else start
    for _ in range(50):
        steepness = gradient(row, data, l2)
        if np.linalg.norm(steepness) < 1e-12:
            break
        bend = expit(x @ row) * expit(-(x @ row)) / len(y)
        row = row - np.linalg.solve((x.T * bend) @ x + l2 * np.eye(len(row)), steepness)
    return row


def _lbfgs(data: tuple[np.ndarray, np.ndarray], settings: Settings) -> list[tuple[int, np.ndarray]]:
    """Rows of an L-BFGS run on the sum, as scikit-learn's of 2017, at the cap and around it."""
    x, y = data
    signs, l2 = 2.0 * y - 1, settings.l2 * len(y)
    marks = sorted({settings.cap // 2, settings.cap, 2 * settings.cap, settings.iterations})
    seen: list[np.ndarray] = []

    def value(row: np.ndarray) -> tuple[float, np.ndarray]:
        margin = signs * (x @ row)
        steepness = x.T @ (-signs * expit(-margin)) + l2 * row
        return float(-log_expit(margin).sum() + 0.5 * l2 * row @ row), steepness

    minimize(
        value, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B",
        callback=lambda row: seen.append(row.copy()),
        options={"gtol": 1e-8, "ftol": 0, "maxiter": settings.iterations, "maxfun": 10**6},
    )  # fmt: skip
    return [(at, seen[at - 1]) for at in marks if at <= len(seen)]


def influence(row: np.ndarray, data: tuple[np.ndarray, np.ndarray], l2: float) -> uw.Influence:
    model = linear(len(row))
    model.weight.data = torch.from_numpy(row)[None]
    x, y = (torch.from_numpy(part) for part in data)
    return uw.Influence(model, (x, y), loss="binary_cross_entropy", l2=l2)


def query_of(wards: Wards, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = wards.test
    cut = slice(settings.test_child, settings.test_child + 1)
    return torch.from_numpy(x[cut]), torch.from_numpy(y[cut])


def _changed(
    wards: Wards, kind: str, i: int
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """A change of one example, as ``whatif`` takes it and as data to refit on."""
    x, y = wards.after
    if kind == RELABELLED:
        other = y.copy()
        other[i] = 1 - y[i]
        return {"relabel": {i: int(other[i])}}, (x, other)
    plain = x.copy()
    plain[i, wards.child] = 0
    return {"replace": {i: (torch.from_numpy(plain[i]), int(y[i]))}}, (plain, y)


def prove(inf: uw.Influence, wards: Wards, settings: Settings, ids: np.ndarray) -> dict[str, Any]:
    """Predicted against actual change of the test child's loss when single examples change.

    Removals are the library's proof; labels and features are changed and refitted here, for the
    given ids and for the children among them.
    """
    row, (x, y) = inf.objective.space.row().numpy(), query_of(wards, settings)
    proof = inf.validate((x, y), top=len(ids), random=settings.random, seed=settings.seed)
    found: dict[str, Any] = {"ids": proof.removed, REMOVED: (proof.predicted[0], proof.actual[0])}
    asked = 2.0 * y.numpy() - 1

    def loss(at: np.ndarray) -> float:
        return float(-log_expit(asked * (x.numpy() @ at))[0])

    for kind, some in ((RELABELLED, ids), (HIDDEN, ids[:4])):
        pairs = []
        for i in some.tolist():
            change, data = _changed(wards, kind, i)
            predicted = float(inf.whatif(on=(x, y), **change).change[0])
            pairs.append((predicted, loss(optimum(data, settings.l2, row)) - loss(row)))
        found[kind] = np.array(pairs).T
        print(f"{kind}: {len(pairs)} refits", flush=True)
    return found


def carriers(inf: uw.Influence, wards: Wards, settings: Settings, ids: np.ndarray) -> np.ndarray:
    """Perturbation times input, share_i I_pert · x, by example and feature ``[m, 127]``."""
    moved = inf.perturbation(query_of(wards, settings), ids.tolist())
    return moved.values[0].numpy() * wards.after[0][ids]


def explain(row: np.ndarray, wards: Wards, settings: Settings) -> dict[str, Any]:
    """Scores of the test child, and how far the four children stand out."""
    scores = influence(row, wards.after, settings.l2).explain(query_of(wards, settings)).values[0]
    order = np.argsort(-np.abs(scores), kind="stable")
    sizes = np.abs(scores[order])
    return {
        "scores": scores, "order": order, "factors": sizes[:4] / sizes[4], "next": sizes[4],
        "sum": scores.sum(),
    }  # fmt: skip


def stopped_early(wards: Wards, settings: Settings) -> dict[str, Any]:
    """What L-BFGS has reached at the cap of 2017 and around it, before and after the change."""
    found: dict[str, Any] = {}
    for name, data in (("before", wards.before), ("after", wards.after)):
        for at, row in _lbfgs(data, settings):
            size = float(np.linalg.norm(gradient(row, data, settings.l2)))
            found[f"{name} {at}"] = {"gradient": size, **wards.verdict(row)}
            if at == settings.cap and name == "after":
                found["row"] = row
    return found
