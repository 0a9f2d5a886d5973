"""Attacks on a head over frozen features, many targets in turn, each verified by retraining."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import upweight as uw
from reproduce.experiment import Steps
from reproduce.minima import binary_losses, linear, minimise
from upweight.attacks import Attempt, Box, Outcome, attack, retrained

__all__ = [
    "PAPER",
    "Campaign",
    "Plan",
    "Victim",
    "drawn",
    "flipped_shares",
    "spotted",
    "towards_target",
    "victim",
]

CHUNK_IMAGES = 40
# Shares of dog-fish test images flipped by 1, 2 and 10 training images.
PAPER = {1: 0.57, 2: 0.77, 10: 0.998}


@dataclass(frozen=True)
class Victim:
    """A logistic head on the features of a frozen extractor, and what it was trained on.

    Attributes:
        extractor: levels 0..255 to features.
        images: 8-bit training images ``[n, 3, h, w]``.
        x: their features ``[n, d]``, float64.
        y: their labels ``[n]``, 0 or 1.
        test_x: features of the test images.
        test_y: their labels.
        inf: of the head, at its minimum.
    """

    extractor: nn.Module
    images: np.ndarray
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    inf: uw.Influence

    @property
    def margins(self) -> np.ndarray:
        """Of the test images: positive when they are classified right."""
        with torch.no_grad():
            z = self.inf.objective.model(self.test_x)[:, 0]
        return (z * (2 * self.test_y - 1)).numpy()

    @cached_property
    def order(self) -> np.ndarray:
        """Training images by self-influence in the clean model, largest first."""
        return np.argsort(-self.inf.self_influence())

    def query(self, test: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features and labels of test images."""
        return self.test_x[list(test)], self.test_y[list(test)]

    def levels(self, ids: Sequence[int]) -> Tensor:
        """The clean training images."""
        return torch.from_numpy(self.images[list(ids)]).float()


def victim(
    extractor: nn.Module, images: tuple[np.ndarray, np.ndarray], features: Any, l2: float
) -> Victim:
    """Train the head.

    Args:
        extractor: frozen.
        images: 8-bit training images and their labels.
        features: training features, test features and test labels.
        l2: of the head.
    """
    x, test_x = (torch.from_numpy(np.asarray(part)).double() for part in features[:2])
    y = torch.from_numpy(images[1]).double()
    head = minimise(linear(x.shape[1]), binary_losses, (x, y), l2)
    inf = uw.Influence(head, (x, y), loss="binary_cross_entropy", l2=l2)
    test_y = torch.from_numpy(np.asarray(features[2])).double()
    return Victim(extractor, images[0], x, y, test_x, test_y, inf)


@dataclass(frozen=True)
class Plan:
    """How an attack goes.

    Attributes:
        images: changed for each target.
        skip: how many of the best images to leave alone (the paper's second try leaves one).
        radius: of the box, in 8-bit levels.
        step: of each round, in levels.
        rounds: at most.
    """

    images: int
    skip: int = 0
    radius: float = 0.5
    step: float = 0.1
    rounds: int = 10

    @property
    def box(self) -> Box:
        """As the library takes it."""
        return Box(self.radius, self.step, 0.0, 255.0)


def _chosen(hurt: Victim, test: int, plan: Plan) -> list[int]:
    """Training images of the other class whose features could move the target most.

    The paper takes the largest Σ|I_pert| over pixels; through a network that costs a pass over all
    training images for every target, so here it is the sum over features.
    """
    other = (hurt.y != hurt.test_y[test]).nonzero()[:, 0].tolist()
    size = hurt.inf.perturbation(hurt.query([test]), other).magnitude()[0]
    best = size.argsort(descending=True)[plan.skip : plan.skip + plan.images]
    return [other[i] for i in best.tolist()]


Way = Callable[[Victim, Sequence[Attempt], Plan], list[Outcome]]


def _along_influence(hurt: Victim, attempts: Sequence[Attempt], plan: Plan) -> list[Outcome]:
    """The paper's way: along the sign of I_pert,loss of the retrained head."""
    return attack(hurt.inf, hurt.extractor, attempts, box=plan.box, rounds=plan.rounds)


def towards_target(hurt: Victim, attempts: Sequence[Attempt], plan: Plan) -> list[Outcome]:
    """Along the sign of the slope (with momentum) of the distance to the target in feature space.

    The aim of Shafahi et al. (2018): an image of the other class that looks like the target to
    the extractor. It needs no influence, and retrains the head once, at the end.
    """
    origin = torch.cat([attempt.inputs for attempt in attempts])
    goal = torch.cat([a.queries[0].repeat(len(a.inputs), 1) for a in attempts]).float()
    box, x, pull = plan.box, origin.clone(), torch.zeros_like(origin)
    for _ in range(plan.rounds):
        leaf = x.clone().requires_grad_(True)
        with torch.enable_grad():
            apart = (hurt.extractor(leaf) - goal).square().sum()
        (slope,) = torch.autograd.grad(apart, leaf)
        pull = 0.8 * pull + slope / slope.abs().mean((1, 2, 3), keepdim=True)
        x = box.clip(x - box.step * pull.sign(), origin)
    parts = x.split([len(attempt.inputs) for attempt in attempts])
    moved = [Attempt(a.ids, part, a.queries) for a, part in zip(attempts, parts, strict=True)]
    return retrained(hurt.inf, hurt.extractor, moved)


@dataclass(frozen=True)
class Campaign:
    """Attacks on single test images.

    Attributes:
        hurt: the model.
        targets: places of the test images.
        steps: where finished chunks are kept.
    """

    hurt: Victim
    targets: Sequence[int]
    steps: Steps

    def run(self, name: str, plan: Plan, way: Way = _along_influence) -> dict[str, np.ndarray]:
        """All targets under one plan: arrays with one entry (or row) per target.

        Args:
            name: of its steps on disk.
            plan: how the attacks go.
            way: from a victim, attempts and a plan to outcomes.
        """
        size = max(1, CHUNK_IMAGES // plan.images)
        chunks = [self.targets[i : i + size] for i in range(0, len(self.targets), size)]
        parts = []
        for number, some in enumerate(chunks):
            parts.append(
                self.steps.once(f"{name}-{number}", lambda s=some: self._attacked(s, plan, way))
            )
            done = sum(len(part["flipped"]) for part in parts)
            flipped = sum(int(part["flipped"].sum()) for part in parts)
            print(f"  {name}: {flipped} flipped of {done}, {len(self.targets) - done} to go",
                  flush=True)  # fmt: skip
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _attacked(self, targets: Sequence[int], plan: Plan, way: Way) -> dict[str, Any]:
        hurt = self.hurt
        attempts = []
        for test in targets:
            ids = _chosen(hurt, test, plan)
            attempts.append(Attempt(ids, hurt.levels(ids), hurt.query([test])))
        found = way(hurt, attempts, plan)
        stored = [
            Attempt(a.ids, o.inputs.round().clamp(0, 255), a.queries)
            for a, o in zip(attempts, found, strict=True)
        ]
        strict = retrained(hurt.inf, hurt.extractor, stored)
        pairs = list(zip(attempts, found, strict=True))
        return {
            "flipped": [bool(o.wrong.all()) for o in found],
            "strict": [bool(o.wrong.all()) for o in strict],
            "clean_loss": np.logaddexp(0, -hurt.margins[list(targets)]),
            "loss": [float(o.loss[0]) for o in found],
            "rounds": [o.rounds for o in found],
            "ids": [o.ids for o in found],
            "pixels": [float((o.inputs - a.inputs).flatten(1).norm(dim=1).mean()) for a, o in pairs],
            "features": [_far(o.features, hurt.x[list(o.ids)]) for o in found],
            "distance": [_far(o.features, a.queries[0]) for a, o in pairs],
            "clean_distance": [_far(hurt.x[list(a.ids)], a.queries[0]) for a in attempts],
            "same_file": [
                float((s.inputs == a.inputs).float().mean())
                for a, s in zip(attempts, stored, strict=True)
            ],
            "rank": [spotted(hurt, o) for o in found],
            "clean_rank": [
                int(np.flatnonzero(np.isin(hurt.order, a.ids))[0]) + 1 for a in attempts
            ],
        }  # fmt: skip


def _far(rows: Tensor, others: Tensor) -> float:
    """Mean distance of features."""
    return float((rows.double() - others).norm(dim=1).mean())


def drawn(hurt: Victim, count: int, seed: int) -> list[int]:
    """Test images to attack: at random among those that are right."""
    right = np.flatnonzero(hurt.margins > 0)
    return np.random.default_rng(seed).permutation(right)[:count].tolist()


def flipped_shares(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[int, float]:
    """Flipped by 1 (either of two tries, as the paper counts), 2 and 10 images."""
    either = found["1"]["flipped"] | found["second"]["flipped"]
    return {1: float(either.mean())} | {k: float(found[f"{k}"]["flipped"].mean()) for k in (2, 10)}


def spotted(hurt: Victim, outcome: Outcome) -> int:
    """Where the audit of the poisoned model puts the first changed image, 1 = at the top."""
    head = linear(hurt.x.shape[1])
    head.weight.data = outcome.row[None].clone()
    x = hurt.x.clone()
    x[list(outcome.ids)] = outcome.features.double()
    inf = uw.Influence(
        head, (x, hurt.y), loss="binary_cross_entropy", l2=float(hurt.inf.objective.l2[0])
    )
    order = np.argsort(-inf.self_influence())
    return int(np.flatnonzero(np.isin(order, outcome.ids))[0]) + 1
