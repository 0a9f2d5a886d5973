"""A report's summary to draw: one model of two queries, with or without pictures."""

import numpy as np

from upweight.report import picture

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--'&{{ 7*7 }}"


def agreement(name="random", r=0.998, slope=1.01, *, spread=0.002, count=40):
    return {
        "name": name,
        "r": r,
        "r_interval": [r - spread, min(r + spread, 1.0)],
        "slope": slope,
        "slope_interval": [slope - 0.01, slope + 0.01],
        "count": count,
    }


def example(place, score, *, pictured):
    found = {"id": place, "label": str(place % 10), "score": score}
    return {**found, "picture": picture(np.eye(8) * place)} if pictured else found


def a_model(name="softmax regression", *, pictured=True):
    rng = np.random.default_rng(0)
    points = [
        {"x": x, "y": 1.01 * x + 1e-4 * noise, "kind": kind, "query": q, "removed": i}
        for kind, size in (("most influential", 0.1), ("random", 0.01))
        for q, (x, noise) in enumerate(rng.normal(size=(2, 2)) * [size, 1])
        for i in range(10)
    ]
    return {
        "name": name,
        "facts": [["Training examples", 700], ["L2", "0.01"]],
        "sentence": "Predicted change of the loss (nats) if removed; positive = helpful.",
        "method": "exact",
        "damping": 0.0,
        "worst_residual": 1e-12,
        "coverage": 1.0,
        "removal": "mean",
        "caveats": ["A first-order prediction."],
        "unit": "nats",
        "measure": "loss",
        "helpful": 1,
        "change": True,
        "queries": [
            {
                "id": f"query-{q}",
                **({"picture": picture(np.eye(8))} if pictured else {}),
                "title": "labelled 5, predicted 3",
                "measure": 2.5,
                "helpful": [example(i, 0.12 / (i + 1), pictured=pictured) for i in range(8)],
                "harmful": [example(i, -0.06 / (i + 1), pictured=pictured) for i in range(8)],
            }
            for q in range(2)
        ],
        "suspects": {
            "caption": "By self-influence.",
            "rows": [
                {
                    "id": f"row-{i}",
                    **({"picture": picture(np.eye(8))} if pictured else {}),
                    "given": "5",
                    "predicted": "3",
                    "self_influence": 1.0 / (i + 1),
                    "loss": float(i % 4),
                    "margin": -0.5,
                    "flipped": i % 2 == 0,
                }
                for i in range(6)
            ],
            "found": {"checked": 6, "found": 3, "total": 4},
        },
        "evidence": {
            "agreements": [agreement("most influential", 0.999), agreement()],
            "points": points,
            "truth": "refits to machine precision",
        },
    }


def estimate(value, spread=0.05):
    return {"value": value, "interval": [value - spread, value + spread]}


def rating(name, value, ahead=None):
    return {
        "name": name,
        "words": name,
        "order": estimate(value),
        "ahead": None if ahead is None else estimate(ahead),
        "r": estimate(value),
        "slope": estimate(0.9) if ahead is None else None,
    }


def retrained():
    """Evidence from a budget, as a study hands it to the page."""
    rng = np.random.default_rng(1)
    ratings = [
        rating("ekfac", 0.61),
        rating("embedding", 0.22, 0.39),
        rating("cosine", 0.18, 0.43),
        rating("loss", -0.07, 0.68),
        rating("random", 0.01, 0.6),
    ]
    finding = {
        "question": "on average over trainings",
        "trials": "random halves of the data",
        "ratings": ratings,
        "ceiling": estimate(0.84, 0.03),
        "count": 60,
        "failed": 1,
        "constant": 0,
    }
    own = {**finding, "question": "this model", "ceiling": None}
    points = [
        {"x": x, "y": 0.8 * x + 0.3 * noise, "kind": "halves", "query": q, "removed": f"half {i}"}
        for q in range(4)
        for i, (x, noise) in enumerate(rng.normal(size=(30, 2)))
    ]
    return {
        "verdict": {"grade": "good", "sentence": "Trust the ranking: LDS 0.61 [0.56, 0.66]."},
        "statistic": {"name": "LDS", "unit": ""},
        "unit": "nats",
        "findings": [finding, own],
        "points": points,
        "pairs": 2 * len(points),
        "truth": "SGD, 5 epochs",
        "cost": {"trainings": 122, "seconds": 300.0, "pace": 2.5},
        "notes": ["Not compared, as these data do not have them: bm25."],
    }


def a_summary(*models):
    return {
        "title": "Which digits made the model say this?",
        "created": "2026-01-02T03:04:05",
        "version": "0.1.0",
        "identity": "model 8f3a",
        "models": list(models) or [a_model()],
    }


def hostile(value):
    """A summary with hostile text wherever text may stand."""
    if isinstance(value, dict):
        kept = ("picture", "models", "measure", "created")
        return {k: v if k in kept and isinstance(v, str) else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value
