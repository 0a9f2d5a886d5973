"""Appendix B: influence at a point that is not a minimum.

At weights θ̃ where the gradient g is not zero, one Newton step on the objective with ε added to the
weight of example z moves θ̃ by

    N(ε) = −(H + ε ∇²ℓ̃(z))⁻¹ (g + ε ∇ℓ̃(z)) = −H⁻¹g + ε (I_up,params(z) + H⁻¹ ∇²ℓ̃(z) H⁻¹ g) + O(ε²)

with H the damped Hessian. The constant is training that goes on; removal is ε = −1/n. Checked on ones
and sevens of MNIST, with a logistic regression and a small tanh network, both stopped early.

    python -m reproduce.appendix_newton
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import upweight as uw
from reproduce.drawing import BLUE, GREY, ORANGE, panels
from reproduce.experiment import Claim, Experiment, Findings, Steps, main
from reproduce.stopped import Case, Stopped, after_descent, descend, newton, stop
from upweight.evaluation import pearson, slope

NEWTON, DESCENT, DAMPED = "Newton step", "descent", "descent, damping 1/(kη)"

LOGISTIC = Stopped(hidden=0, every=2, pool=1, l2=0.01, rate=0.05, damping=0.0)
NETWORK = Stopped(hidden=6, every=11, pool=4, l2=0.001, rate=0.5, damping=0.05)


@dataclass(frozen=True)
class Settings:
    """``counts`` are of removals and of queries; ``epsilon`` of the finite differences."""

    logistic: Stopped = LOGISTIC
    network: Stopped = NETWORK
    counts: tuple[int, int] = (40, 8)
    epsilon: float = 1e-6
    seed: int = 0


def _compared(case: Case, rows: Tensor, inf: uw.Influence, third: Tensor | float) -> dict[str, Any]:
    """Predictions against both baselines after one kind of continuation.

    Args:
        case: the stopped model.
        rows: continued weights ``[1 + m, p]``, first with all examples.
        inf: gives the scores.
        third: the change of the weights that influence leaves out, ``[m, p]``.
    """
    losses, frozen = case.losses(rows), case.losses(case.risk.objective.space.row()[None])
    change = inf.params(case.gone.tolist()).rows
    ahead = case.slopes(rows[0])
    predicted = {
        "score": inf.explain(case.queries).values[:, case.gone],
        "score, slope ahead": (ahead @ change.T).numpy(),
        "with third term": (ahead @ (change + third).T).numpy(),
    }
    actual = {"frozen": losses[:, 1:] - frozen, "equally long": losses[:, 1:] - losses[:, :1]}
    found: dict[str, Any] = {
        base: {
            name: {
                "r": pearson(values.ravel(), truth.ravel()),
                "slope": slope(values.ravel(), truth.ravel()),
                "error": float(np.sqrt(np.mean((truth - values) ** 2))),
            }
            for name, values in predicted.items()
        }
        for base, truth in actual.items()
    }
    found["typical_change"] = float(np.sqrt(np.mean(actual["equally long"] ** 2)))
    found["constant"] = float(np.sqrt(np.mean((losses[:, :1] - frozen) ** 2)))
    found["pairs"] = {
        name: values.ravel().tolist()
        for name, values in {"predicted": predicted["score, slope ahead"], **actual}.items()
    }
    return found


def _stop(stopped: Stopped, settings: Settings, steps: int) -> dict[str, Any]:
    """Sizes of the three terms where training stops after some steps, for one removal."""
    case = stop(stopped, steps, settings.counts, settings.seed)
    return _sizes(newton(case, settings.epsilon, case.gone), len(case.risk.data), steps)


def _sizes(found: dict[str, Any], n: int, steps: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "gradient_norm": found["gradient_norm"],
        "constant": float(found["constant"].norm()),
        "upweight": float(found["upweight"].norm(dim=1).median()) / n,
        "third": float(found["third"].norm(dim=1).median()) / n,
        "error": found["error"],
    }


def _measured(stopped: Stopped, settings: Settings) -> dict[str, Any]:
    case = stop(stopped, stopped.steps, settings.counts, settings.seed)
    found, n = newton(case, settings.epsilon, case.gone), len(case.risk.data)
    stops = [_stop(stopped, settings, k) for k in stopped.others]
    start = case.risk.objective.space.row()
    rows = start + torch.cat([found["constant"][None], found["moved"]])
    one_step = case.influence(damping=stopped.damping)
    # Directions of curvature below 1/(kη) hardly move in k steps of rate η: a damping of that size.
    damping = max(1 / (stopped.rate * stopped.steps), -2 * found["lowest"])
    descended = descend(case)
    return {
        "n": n,
        "p": len(start),
        "lowest_eigenvalue": found["lowest"],
        "descent_damping": damping,
        NEWTON: _compared(case, rows, one_step, -found["third"] / n),
        DESCENT: _compared(case, descended, case.influence(method=after_descent(case)), 0.0),
        DAMPED: _compared(case, descended, case.influence(damping=damping), 0.0),
        f"{DESCENT}, as after a Newton step": _compared(case, descended, one_step, 0.0),
        "stops": sorted([_sizes(found, n, stopped.steps), *stops], key=lambda one: one["steps"]),
    }


def _claims(values: dict[str, Any], largest_error: float) -> list[Claim]:
    lines = []
    for name, found in values.items():
        error = max(stop["error"] for stop in found["stops"])
        lines.append(Claim(
            f"{name} ({found['p']} parameters): dN/dε by differences against the formula",
            f"equal (target: relative error ≤ {largest_error:.0e})",
            f"largest relative error {error:.0e}", "met" if error <= largest_error else "missed",
        ))  # fmt: skip
        for kind, least in ((NEWTON, 0.98), (DESCENT, 0.9)):
            frozen, equal = (
                found[kind][base]["score, slope ahead"] for base in ("frozen", "equally long")
            )
            good = equal["r"] >= least and frozen["error"] > 10 * equal["error"]
            lines.append(Claim(
                f"{name}, {kind}: predicted against actual change, full set trained equally long "
                "and frozen θ̃",
                f"agrees only with the first (r ≥ {least}, error of the other > 10 times)",
                f"r {equal['r']:.3f}, slope {equal['slope']:.2f}, error {equal['error']:.1e} nats; "
                f"frozen: r {frozen['r']:.2f}, error {frozen['error']:.1e}",
                "met" if good else "missed",
            ))  # fmt: skip
    early = {name: found["stops"][0] for name, found in values.items()}
    late = {name: found["stops"][-1] for name, found in values.items()}
    shares = {
        name: [stop[name]["third"] / stop[name]["upweight"] for stop in (early, late)]
        for name in values
    }
    lines.append(Claim(
        "the term H⁻¹∇²ℓ̃H⁻¹g, in units of I_up,params, vanishes with the constant −H⁻¹g",
        "in proportion, 0 at a minimum (target: within a factor of 2)",
        "; ".join(
            f"{name} {a:.2g} after {early[name]['steps']} steps, {b:.1g} after "
            f"{late[name]['steps']} (constant {early[name]['constant']:.2g}, "
            f"{late[name]['constant']:.1g})"
            for name, (a, b) in shares.items()
        ),
        "met" if all(
            b / a <= 2 * late[name]["constant"] / early[name]["constant"]
            for name, (a, b) in shares.items()
        ) else "missed",
    ))  # fmt: skip
    return lines


def _notes(values: dict[str, Any], settings: Settings) -> list[str]:
    logistic, network = values.values()
    terms = [
        f"{name} {stop['constant']:.2g} : {stop['upweight']:.1g} : {stop['third']:.1g}"
        for name, found in values.items()
        for stop in found["stops"]
        if stop["steps"] == settings.logistic.steps
    ]
    step = logistic[NEWTON]["equally long"]
    descents = {
        kind: " and ".join(
            f"{one['r']:.3f} with slope {one['slope']:.2f}"
            for one in (
                found[kind]["equally long"]["score, slope ahead"] for found in values.values()
            )
        )
        for kind in (DESCENT, DAMPED, f"{DESCENT}, as after a Newton step")
    }
    return [
        f"Logistic regression ({logistic['n']:,} images) and a tanh network ({network['n']:,} "
        f"images of 7 by 7 pixels), stopped after {settings.logistic.steps} steps of gradient "
        f"descent. The network's Hessian is indefinite there (smallest eigenvalue "
        f"{network['lowest_eigenvalue']:.1e}), so {settings.network.damping} is added. Sizes of "
        "constant : influence : third term for one removal, medians: " + "; ".join(terms) + ".",
        f"{settings.counts[0]} images are left out one at a time ({settings.counts[0] // 2} of "
        f"largest loss, the rest random), with {settings.counts[1]} queries. Against the frozen "
        "model the change is mostly the training that went on; it is the same for all removals "
        "of one query, so a correlation within one query would not notice, one over all does.",
        "Where the constant is large, the query's gradient has moved too: for the logistic "
        f"regression and a Newton step the score at θ̃ has slope {step['score']['slope']:.2f}, "
        "with the query's gradient taken after the constant step "
        f"{step['score, slope ahead']['slope']:.3f}, and the third term brings the error from "
        f"{step['score, slope ahead']['error']:.1e} to {step['with third term']['error']:.1e}. "
        "Lines and figure use the query's gradient after the full set's continuation.",
        "k steps of gradient descent of rate η are not a Newton step. To first order they put "
        "(1 − (1 − ηh)^k)/h in place of 1/h for every eigenvalue h of the Hessian; passed to "
        f"`Influence` as a ready inverse it gives r = {descents[DESCENT]} (logistic, network). A "
        f"damping of 1/(kη) is close to it: {descents[DAMPED]}. The inverse of the Newton step "
        f"is not: {descents[f'{DESCENT}, as after a Newton step']}.",
    ]  # fmt: skip


def _figure(values: dict[str, Any]) -> Figure:
    """Predicted against actual: above the frozen weights as baseline, below equal training."""
    drawing, axes = panels(4, 2, size=(3.7, 3.3))
    columns = [(name, kind) for name in values for kind in (NEWTON, DESCENT)]
    for column, (name, kind) in enumerate(columns):
        found = values[name][kind]
        for axis, base, colour in zip(
            axes[:, column], ("frozen", "equally long"), (ORANGE, BLUE), strict=True
        ):
            pairs, r = found["pairs"], found[base]["score, slope ahead"]["r"]
            axis.scatter(pairs["predicted"], pairs[base], s=9, color=colour, alpha=0.6, lw=0)
            axis.axline((0, 0), slope=1, color=GREY, linewidth=0.8, zorder=0)
            axis.set_title(f"{name}, {kind}: r = {r:.3f}", fontsize=10)
            axis.locator_params(nbins=5)
        axes[1, column].set_xlabel("predicted change of loss (nats)")
    axes[0, 0].set_ylabel("actual, against frozen θ̃ (nats)")
    axes[1, 0].set_ylabel("actual, full set trained equally long")
    return drawing


def run(settings: Settings, steps: Steps) -> Findings:
    values = {}
    for name in ("logistic", "network"):
        print(name, "stopped early: Newton steps and descent", flush=True)
        stopped: Stopped = getattr(settings, name)
        # One string: the findings are nested.
        made = steps.once(
            name, lambda stopped=stopped: {"found": json.dumps(_measured(stopped, settings))}
        )
        values[name] = json.loads(str(made["found"]))
    drawing = _figure(values)
    for found in values.values():
        for one in found.values():
            if isinstance(one, dict):
                del one["pairs"]
    return Findings(values, _claims(values, 1e-6), _notes(values, settings), drawing)


EXPERIMENT = Experiment(
    "appendix_newton",
    "Appendix B",
    "influence where training has not converged",
    Settings(),
    run,
)

if __name__ == "__main__":
    main(EXPERIMENT)
