"""Figure 2, left and middle: predicted against actual change for softmax regression on MNIST.

Ten classes, no bias, n = 55,000, p = 7,840, L2 0.01, test image 8 (a 5, misclassified); the 500
training images of largest influence and 500 random ones are really removed, one at a time.

    python -m reproduce.fig2_logistic [--out reproduce/results] [--removals 500]
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import upweight as uw
from reproduce.datasets import mnist
from upweight.evaluation import agreement
from upweight.tables import atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HELD_OUT, L2, TEST_IMAGE = 5_000, 0.01, 8
KINDS = ("most influential", "random")


def trained(x: torch.Tensor, y: torch.Tensor) -> nn.Linear:
    """The minimiser of the objective in float64 (gradient norm about 1e-8)."""
    model = nn.Linear(x.shape[1], 10, bias=False).double()
    nn.init.zeros_(model.weight)
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=600, tolerance_grad=1e-9, tolerance_change=0,
        history_size=50, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y) + 0.5 * L2 * model.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return model


def rows(predicted: np.ndarray, actual: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    """Agreement for both kinds of removals."""
    return {
        kind: agreement(predicted[chosen == kind], actual[chosen == kind]).as_dict()
        for kind in KINDS
    }


def stochastic(model: nn.Linear, train: Any, query: Any) -> dict[str, Any]:
    """Scores of the stochastic estimator: the paper's setting, one repeat of it, automatic."""
    settings = {
        "lissa (25, 5000, 10)": uw.LiSSA(scale=25.0, repeats=10, batch_size=1, tail=0.0, seed=17),
        "lissa (25, 5000, 1)": uw.LiSSA(scale=25.0, repeats=1, batch_size=1, tail=0.0, seed=17),
        "lissa (auto, same draws)": uw.LiSSA(repeats=10, batch_size=1, seed=17),
        "lissa (default)": uw.LiSSA(seed=17),
    }
    found = {}
    for name, solver in settings.items():
        inf = uw.Influence(model, train, loss="cross_entropy", l2=L2, method=solver)
        found[name] = (inf.explain(query, accept=True), getattr(inf.inverse, "scale", None))
    return found


def figure(results: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> None:
    """Scatter plots like the paper's, the random removals beside the influential ones."""
    names = ["exact", "lissa (25, 5000, 10)", "lissa (25, 5000, 1)", "lissa (default)"]
    drawing, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 4.2), sharey=True)
    actual, chosen = arrays["actual"], arrays["chosen"]
    reach = 1.1 * float(np.abs(actual).max())
    for axis, name in zip(axes, names, strict=True):
        axis.plot([-reach, reach], [-reach, reach], color="0.6", linewidth=0.8, zorder=0)
        for kind, colour in zip(KINDS, ("#1f5fa8", "#d9822b"), strict=True):
            which = chosen == kind
            r = results["methods"][name]["agreement"][kind]["r"]
            axis.scatter(
                arrays[name][which], actual[which], s=9, color=colour, alpha=0.7,
                label=f"{kind}: r = {r:.5f}", linewidth=0,
            )  # fmt: skip
        axis.set(title=name, xlabel="predicted change of loss (nats)", xlim=(-reach, reach))
        axis.legend(frameon=False, fontsize=8)
    axes[0].set(ylabel="actual change of loss (nats)", ylim=(-reach, reach))
    drawing.tight_layout()
    drawing.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--removals", type=int, default=500, help="of each kind")
    asked = parser.parse_args()
    began = time.time()
    digits = mnist()
    x = torch.from_numpy(digits.train_x[HELD_OUT:]).double()
    y = torch.from_numpy(digits.train_y[HELD_OUT:])
    query = (torch.from_numpy(digits.test_x[[TEST_IMAGE]]).double(),
             torch.from_numpy(digits.test_y[[TEST_IMAGE]]))  # fmt: skip
    print("training softmax regression on", len(x), "images", flush=True)
    model = trained(x, y)
    exact = uw.Influence(model, (x, y), loss="cross_entropy", l2=L2)
    print(f"  gradient norm {float(exact.risk.gradient().norm()):.1e}", flush=True)
    proof = exact.validate(query, top=asked.removals, random=asked.removals)
    print(proof, flush=True)
    places, chosen, actual = proof.removed, proof.chosen, proof.actual[0]
    found: dict[str, Any] = {"exact": (exact.explain(query), None)}
    cg = uw.Influence(model, (x, y), loss="cross_entropy", l2=L2, method="cg")
    found["cg"] = (cg.explain(query), None)
    found |= stochastic(model, (x, y), query)
    results: dict[str, Any] = {
        "settings": {
            "n": len(x), "p": model.weight.numel(), "l2": L2, "test_image": TEST_IMAGE,
            "removals_of_each_kind": asked.removals, "seed": 0, "lissa_seed": 17,
        },
        "versions": {"upweight": uw.__version__, "torch": torch.__version__},
        "gradient_norm": float(exact.risk.gradient().norm()),
        "truth": proof.truth,
        "wall_seconds": None,
        "sum_of_scores": float(found["exact"][0].values.sum()),
        "methods": {},
    }  # fmt: skip
    arrays = {"actual": actual, "chosen": chosen, "removed": places}
    for name, (scores, scale) in found.items():
        predicted = scores.values[0, places]
        arrays[name] = predicted
        results["methods"][name] = {
            "agreement": rows(predicted, actual, chosen),
            "residual": float(scores.provenance.residual[0]),
            "scale": scale,
            "caveats": list(scores.provenance.caveats),
        }
        line = {k: round(v["r"], 6) for k, v in results["methods"][name]["agreement"].items()}
        print(f"{name}: {line}, scale {scale}", flush=True)
    results["wall_seconds"] = round(time.time() - began, 1)
    asked.out.mkdir(parents=True, exist_ok=True)
    figure(results, arrays, asked.out / "fig2_logistic.png")
    text = json.dumps(results, indent=1, default=lambda value: np.asarray(value).tolist())
    atomic_write(asked.out / "fig2_logistic.json", text.encode())
    print(f"{os.path.relpath(asked.out)}/fig2_logistic.json, .png; {results['wall_seconds']} s")


if __name__ == "__main__":
    main()
