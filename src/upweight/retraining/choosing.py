"""The fastest way to train many models on this machine, by timed steps."""

from dataclasses import replace
from typing import final

import numpy as np
import torch

from upweight.budget import budget
from upweight.probes import elapsed, peak_bytes
from upweight.retraining.layers import Layers, stages_of
from upweight.retraining.slopes import Mapped, Slopes
from upweight.retraining.together import ONE, Trainer, Way
from upweight.retraining.trials import Trials

__all__ = ["chunks", "fastest"]

MOST, GAIN, TIMED = 256, 0.97, 2
WORTH = 0.05


@final
class _Race:
    """Candidates against the best so far; what is wrong or slower is out.

    Args:
        trainer: of the models.
        trials: to be trained.
    """

    def __init__(self, trainer: Trainer, trials: Trials) -> None:
        self.trainer, self.trials = trainer, trials
        self.bytes, (self._truth, _) = peak_bytes(lambda: self._first(ONE))
        self.best, self.least = ONE, self._seconds(ONE)

    def _part(self, way: Way) -> Trials:
        """Some trials for a way: the last of the largest seed, as the first are of all data."""
        seeds, counts = np.unique(self.trials.seeds, return_counts=True)
        order = np.argsort(self.trials.seeds == seeds[counts.argmax()], kind="stable")
        return self.trials.take(order[::-1][: way.at_once])

    def _first(self, way: Way) -> tuple[dict[str, torch.Tensor], int]:
        """Gradients of the first model at the first step, and how many there were."""
        steps = self.trainer.steps(self._part(way), way)
        blocks, _ = next(steps)
        steps.close()  # type: ignore[attr-defined]
        found = {
            name: block.grad[0].clone() for name, block in blocks.items() if block.grad is not None
        }
        return found, len(next(iter(blocks.values())))

    def _seconds(self, way: Way) -> float:
        """Of a step, for each model."""
        part = self._part(way)
        steps = self.trainer.steps(part, way)
        times = [elapsed(lambda: next(steps, None))[0] for _ in range(1 + TIMED)]
        steps.close()  # type: ignore[attr-defined]
        return min(times[1:]) / len(part)

    def fits(self, at_once: int) -> bool:
        """Whether so many models stay within the memory budget."""
        return self.bytes * at_once <= budget()

    def enter(self, way: Way) -> bool:
        """Time a way, and keep it if it is the best; whether more models may be faster still."""
        try:
            found, _ = self._first(way)
        except (RuntimeError, ValueError, NotImplementedError):
            return False
        tolerance = 1e-8 if next(iter(found.values())).dtype == torch.float64 else 1e-2
        for name, truth in self._truth.items():
            if not bool((found[name] - truth).norm() <= tolerance * truth.norm() + 1e-12):
                return False
        spent = self._seconds(way)
        better = spent < GAIN * self.least
        if better:
            self.best, self.least = way, spent
        return better


def fastest(trainer: Trainer, trials: Trials) -> Way:
    """The way with the least time for a step, among those that give autograd's gradients.

    Randomness and batch statistics need one model after the other.
    """
    if trainer.coupled:
        return ONE
    if trainer.random:  # all rows of a minibatch, so that trials share their masks
        return replace(ONE, together=True)
    race = _Race(trainer, trials)
    for form, first in _forms(trainer):
        _enter(race, form, first)
        if race.best.make is form:
            break
    return race.best


def _forms(trainer: Trainer) -> list[tuple[type[Slopes], int]]:
    """What can train many models at once, and the least number for which it pays to look."""
    objective = trainer.risk.objective.on(trainer.module(trainer.training.seed))
    inputs = trainer.rows.at(torch.tensor([0])).inputs
    single = isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(inputs[0], torch.Tensor)
    known = single and stages_of(objective) is not None
    return [(Layers, 1), (Mapped, 2)] if known else [(Mapped, 2)]


def _enter(race: _Race, form: type[Slopes], first: int) -> None:
    """More and more models at once, until that is no faster."""
    common = int(np.unique(race.trials.seeds, return_counts=True)[1].max())
    for together in (False, True):
        at_once, most = first, common if together else len(race.trials)
        while at_once <= min(MOST, most) and race.fits(at_once):
            better = race.enter(Way(form, form.name, at_once, together))
            if not better and at_once > 2:
                break
            at_once *= 2


def chunks(trials: Trials, way: Way) -> list[np.ndarray]:
    """Numbers of the trials to be trained together, of one seed where they share rows."""
    order = np.argsort(trials.seeds, kind="stable")
    groups = [order]
    if way.together:
        groups = [order[trials.seeds[order] == seed] for seed in np.unique(trials.seeds)]
    parts = [np.array_split(group, -(-len(group) // way.at_once)) for group in groups]
    return [part for some in parts for part in some]
