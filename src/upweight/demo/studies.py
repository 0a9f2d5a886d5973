"""A study of one of the demo's models."""

import torch
import torch.nn.functional as F

from upweight.demo.digits import Split
from upweight.demo.models import Model, minimise
from upweight.recipe import Recipe
from upweight.study import Study, Wish

__all__ = ["study"]

QUERIES = 8


def study(model: Model, digits: Split, seed: int = 0) -> Study:
    """Train a model and ask about the test digits that it gets wrong most confidently."""
    torch.manual_seed(seed)
    module = model.build()
    minimise(module, digits.train, model.l2)
    pixels, labels = digits.test
    with torch.no_grad():
        outputs = module(pixels)
    wrong = (outputs.argmax(1) != labels).nonzero()[:, 0]
    losses = F.cross_entropy(outputs[wrong], labels[wrong], reduction="none")
    worst = wrong[losses.argsort(descending=True, stable=True)[:QUERIES]]
    recipe = Recipe(
        module,
        digits.train,
        digits.queries(worst),
        "cross_entropy",
        l2=model.l2,
        ids=digits.train_ids.tolist(),
        image_shape=(8, 8),
    )
    facts = [
        ("Test digits right", f"{1 - len(wrong) / len(labels):.1%} of {len(labels)}"),
        ("Flipped training labels", f"{len(digits.flipped)}"),
        ("Trained by", "L-BFGS, float64"),
    ]
    return Study(
        recipe,
        Wish(top=8, seed=seed),
        name=model.name,
        facts=facts,
        flipped=digits.flipped.tolist(),
    )
