"""Beyond the paper: the derivative of test losses in the L2 strength, against real refits.

Logistic regression with a bias on MNIST's ones and sevens. The derivative in the L2 of the weight
and of the bias, for every test image, against central differences of refits; and the L2 strength
learnt by descent on a validation loss.

    python -m reproduce.l2_derivative
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import upweight as uw
from reproduce.datasets import mnist
from reproduce.datasets.digits import HELD_OUT
from reproduce.drawing import BLUE, GREEN, GREY, ORANGE, panels
from reproduce.experiment import Claim, Experiment, Findings, Steps, main
from reproduce.minima import binary_losses, minimise
from upweight.bars import track

Pair = tuple[Tensor, Tensor]
BLOCKS = ("weight", "bias")


@dataclass(frozen=True)
class Settings:
    """``step`` is relative to l2; descent goes ``rate`` times the derivative in log l2."""

    powers: tuple[float, ...] = (-3, -2.5, -2, -1.5, -1, -0.5, 0)
    step: float = 2e-4
    descent_from: float = 1.0
    rate: float = 8.0
    descent_steps: int = 25
    stride: int = 1
    thin: int = 1


def _data(settings: Settings) -> tuple[Pair, Pair, Pair]:
    """Ones and sevens: training, validation (the 5,000 images set aside) and test part."""
    digits = mnist()
    parts = []
    for x, y in (
        (digits.train_x[HELD_OUT :: settings.thin], digits.train_y[HELD_OUT :: settings.thin]),
        (digits.train_x[:HELD_OUT], digits.train_y[:HELD_OUT]),
        (digits.test_x, digits.test_y),
    ):
        kept = (y == 1) | (y == 7)
        pixels = torch.from_numpy(x[kept][:, :: settings.stride]).double()
        parts.append((pixels, torch.from_numpy((y[kept] == 1).astype(np.int64))))
    return parts[0], parts[1], parts[2]


def _measured(model: nn.Module, data: Pair) -> Tensor:
    with torch.no_grad():
        return binary_losses(model(data[0]), data[1])


def _polished(model: nn.Module, train: Pair, l2: dict[str, float]) -> uw.Influence:
    """The minimiser near the model, to rounding, by Newton's method; as an Influence."""
    for _ in range(20):
        inf = uw.Influence(model, train, loss="binary_cross_entropy", l2=l2)
        slope = inf.risk.gradient()
        if float(slope.norm()) < 1e-14:
            return inf
        row = inf.objective.space.row() - inf.inverse.apply(slope[None])[0]
        model.load_state_dict(inf.objective.space.unflatten(row))
    return uw.Influence(model, train, loss="binary_cross_entropy", l2=l2)


def _fit(train: Pair, l2: float) -> nn.Module:
    model = nn.Linear(train[0].shape[1], 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return minimise(model, binary_losses, train, l2, steps=2000)


def _copy(model: nn.Module) -> nn.Module:
    other = nn.Linear(model.in_features, 1).double()  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    return other


def _at(l2: float, data: tuple[Pair, Pair, Pair], step: float) -> dict[str, Any]:
    """Derivative and central difference of every test loss in the L2 of each block."""
    train, _, test = data
    inf = _polished(_fit(train, l2), train, dict.fromkeys(BLOCKS, l2))
    found = inf.l2_derivative(test)
    numeric = []
    for block in BLOCKS:
        ends = []
        for sign in (1, -1):
            moved = dict.fromkeys(BLOCKS, l2) | {block: l2 * (1 + sign * step)}
            ends.append(
                _measured(_polished(_copy(inf.objective.model), train, moved).objective.model, test)
            )
        numeric.append((ends[0] - ends[1]) / (2 * l2 * step))
    predicted, actual = found.values, torch.stack(numeric, dim=1).numpy()
    size = np.linalg.norm(actual, axis=0)
    return {
        "loss": float(_measured(inf.objective.model, test).mean()),
        "derivative": predicted.mean(0),
        "numeric": actual.mean(0),
        "mean_error": float(abs(predicted.sum(1).mean() / actual.sum(1).mean() - 1)),
        "query_error": np.linalg.norm(predicted - actual, axis=0) / size,
        "gradient_norm": float(inf.risk.gradient().norm()),
    }  # fmt: skip


def _descend(data: tuple[Pair, Pair, Pair], settings: Settings) -> dict[str, Any]:
    """L2 by gradient descent on the validation loss in log l2; the test loss only looks on."""
    train, validation, test = data
    l2, path = settings.descent_from, []
    for step in track(range(settings.descent_steps + 1), "descent", settings.descent_steps + 1):
        model = _fit(train, l2)
        inf = uw.Influence(model, train, loss="binary_cross_entropy", l2=l2)
        losses = [float(_measured(model, part).mean()) for part in (validation, test)]
        path.append([l2, *losses])
        if step < settings.descent_steps:
            l2 *= math.exp(-settings.rate * l2 * float(inf.l2_derivative(validation).total.mean()))
    return {"path": np.array(path)}


def _figure(strengths: np.ndarray, found: list[dict[str, Any]], path: np.ndarray) -> Figure:
    drawing, axes = panels(3)
    losses = np.array([float(one["loss"]) for one in found])
    slopes = np.array([one["derivative"].sum() for one in found])
    axes[0].plot(strengths, 1e3 * losses, "o", color=GREY, markersize=5, label="refits")
    for at, loss, slope in zip(strengths, losses, slopes, strict=True):
        near = at * np.array([0.7, 1, 1.3])
        axes[0].plot(near, 1e3 * (loss + slope * (near - at)), color=BLUE, linewidth=2)
    axes[0].plot([], [], color=BLUE, linewidth=2, label="tangents: l2_derivative")
    axes[0].set(xscale="log", yscale="log", xlabel="l2", ylabel="mean test loss (millinats)")
    axes[0].legend(frameon=False, fontsize=8)
    errors = [("mean test loss", [one["mean_error"] for one in found], BLUE)]
    for b, (block, colour) in enumerate(zip(BLOCKS, (ORANGE, GREEN), strict=True)):
        label = f"all test images, l2 of the {block}"
        errors.append((label, [one["query_error"][b] for one in found], colour))
    for label, values, colour in errors:
        axes[1].plot(
            strengths, np.array(values, float), "o-", color=colour, markersize=4, label=label
        )
    axes[1].set(xscale="log", yscale="log", xlabel="l2", ylim=(1e-10, 1e-4),
                ylabel="relative difference from refits")  # fmt: skip
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].plot(
        1e3 * path[:, 1], "o-", color=ORANGE, markersize=4, label="validation loss (descended)"
    )
    axes[2].plot(1e3 * path[:, 2], "o-", color=BLUE, markersize=4, label="test loss (only watched)")
    axes[2].set(xlabel="step of descent on log l2", ylabel="mean loss (millinats)", yscale="log")
    axes[2].legend(frameon=False, fontsize=8)
    return drawing


def _claims(values: dict[str, Any]) -> list[Claim]:
    worst, most = values["largest_mean_error"], values["largest_query_error"]
    start, end = values["path"][0], values["path"][-1]
    return [
        Claim(
            "derivative of the mean test loss in l2 against central differences of refits, largest "
            "relative difference", "-", f"{worst:.1e} over {len(values['l2'])} strengths",
            "surpassed" if worst < 1e-5 else "missed",
            "" if worst < 1e-5 else "It should be below 1e-5.",
        ),
        Claim(
            "the same for all test images together, l2 of the weight and of the bias apart", "-",
            f"{most:.1e}", "surpassed" if most < 1e-5 else "missed",
            "" if most < 1e-5 else "It should be below 1e-5.",
        ),
        Claim(
            "l2 learnt by descent on the validation loss: test loss, which it never sees", "-",
            f"{1e3 * start[2]:.1f} to {1e3 * end[2]:.1f} millinats (validation {1e3 * start[1]:.1f} "
            f"to {1e3 * end[1]:.1f}), l2 {start[0]:.3g} to {end[0]:.3g}",
            "surpassed" if end[1] < start[1] and end[2] < start[2] else "missed",
        ),
    ]  # fmt: skip


def run(settings: Settings, steps: Steps) -> Findings:
    data = _data(settings)
    strengths, found = 10.0 ** np.array(settings.powers), []
    for l2 in strengths.tolist():
        done = steps.once(f"l2 {l2:.6g}", lambda at=l2: _at(at, data, settings.step))
        found.append(done)
        print(f"l2 {l2:.4f}: relative difference {float(done['mean_error']):.1e}", flush=True)
    path = steps.once("descent", lambda: _descend(data, settings))["path"]
    values = {
        "n": len(data[0][0]), "validation": len(data[1][0]), "test": len(data[2][0]),
        "l2": strengths, "path": path,
        "loss": [float(one["loss"]) for one in found],
        "derivative": [one["derivative"] for one in found],
        "numeric": [one["numeric"] for one in found],
        "mean_error": [float(one["mean_error"]) for one in found],
        "query_error": [one["query_error"] for one in found],
        "largest_mean_error": max(float(one["mean_error"]) for one in found),
        "largest_query_error": max(float(one["query_error"].max()) for one in found),
        "gradient_norm": max(float(one["gradient_norm"]) for one in found),
    }  # fmt: skip
    falling = bool((np.diff(path[:, 1]) <= 0).all())
    notes = [
        f"Logistic regression with a bias on {values['n']} ones and sevens. At each L2 the model is "
        f"trained to a gradient of {values['gradient_norm']:.0e}, and again with the L2 of the "
        f"weight or of the bias moved by ±{settings.step:.0e} of itself; {values['test']} test "
        "losses are compared. What is left is the difference quotient's own error.",
        f"Descent: {settings.descent_steps} steps of {settings.rate:g} times the derivative of the "
        f"loss of {values['validation']} validation images in log l2. The validation loss "
        + ("falls at every step." if falling else "does not fall at every step.")
        + " One solve with the curvature per step serves all validation images.",
    ]
    return Findings(values, _claims(values), notes, _figure(strengths, found, path))


EXPERIMENT = Experiment(
    "l2_derivative", "Beyond: regularisation", "the derivative of test losses in the L2 strength",
    Settings(), run,
)  # fmt: skip

if __name__ == "__main__":
    main(EXPERIMENT)
