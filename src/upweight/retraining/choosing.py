"""The fastest way to train many models on this machine, by timed steps."""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch

from upweight.budget import budget
from upweight.probes import elapsed, peak_bytes
from upweight.retraining.layers import Layers, stages_of
from upweight.retraining.slopes import Mapped, Single, Slopes
from upweight.retraining.together import ONE, Trainer, Way
from upweight.retraining.trials import Trials

__all__ = ["alone", "chunks", "fastest", "way_of"]

MOST, GAIN, MISSES = 256, 0.97, 2
POOLS, FEW = (4, 8), 4
TIMED, ENOUGH = (1, 12), 0.05
SECONDS, SHARE = 0.3, 0.05


@final
class _Race:
    """Candidates against the best so far; what is wrong or slower is out.

    It may take 0.3 seconds, or a twentieth of what the best so far would take for all trials.

    Args:
        trainer: of the models.
        trials: to be trained.
    """

    def __init__(self, trainer: Trainer, trials: Trials) -> None:
        self.trainer, self.trials = trainer, trials
        self.bytes, self._truth = peak_bytes(lambda: _first(trainer, self._part(ONE), ONE))
        self._right: dict[Way, bool] = {}
        self._spent, self._steps = 0.0, trainer.training.steps(len(trainer.risk.data))
        self.best, self.least = ONE, self._seconds(ONE)

    def _part(self, way: Way) -> Trials:
        """Some trials for a way: the last of the largest seed, as the first are of all data."""
        seeds, counts = np.unique(self.trials.seeds, return_counts=True)
        order = np.argsort(self.trials.seeds == seeds[counts.argmax()], kind="stable")
        return self.trials.take(order[::-1][: way.pool])

    def _seconds(self, way: Way) -> float:
        """Of a step, for each model."""
        part, device = self._part(way), self.trainer.risk.objective.space.device
        with closing(self.trainer.steps(part, way)) as steps:

            def step() -> object:
                found = next(steps, None)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                return found

            times = [elapsed(step)[0]]
            while len(times) <= TIMED[0] or (len(times) <= TIMED[1] and sum(times) < ENOUGH):
                spent, found = elapsed(step)
                if found is None:
                    break
                times.append(spent)
        self._spent += sum(times)
        return min(times[1:] or times) / len(part)

    def worth(self, at_once: int) -> bool:
        """Whether so many models fit the memory budget, and a look at them into its time."""
        cost = (1 + TIMED[0]) * at_once * self.least
        limit = max(SECONDS, SHARE * self.least * self._steps * len(self.trials))
        return self.bytes * at_once <= budget() and self._spent + cost <= limit

    def enter(self, way: Way) -> float:
        """Seconds of a step for each model, infinite for what gives other gradients or cannot run.

        The best is kept.
        """
        if not self._agrees(way):
            return math.inf
        try:
            spent = self._seconds(way)
        except RuntimeError:  # out of memory, as torch says it
            return math.inf
        if spent < GAIN * self.least:
            self.best, self.least = way, spent
        return spent

    def _agrees(self, way: Way) -> bool:
        """Whether a few models get autograd's gradients in this way."""
        at_once = min(way.at_once, FEW)
        few = replace(way, at_once=at_once, pool=at_once * (1 + (way.pool > way.at_once)))
        if few not in self._right:
            spent, self._right[few] = elapsed(
                lambda: _same(self.trainer, self._part(few), few, self._truth)
            )
            self._spent += spent
        return self._right[few]


def _first(trainer: Trainer, trials: Trials, way: Way) -> dict[str, torch.Tensor]:
    """Gradients of the first model at the first step."""
    with closing(trainer.steps(trials, way)) as steps:
        blocks, _ = next(steps)
    named = {name: block.grad for name, block in blocks.items()}
    return {name: slope[0].clone() for name, slope in named.items() if slope is not None}


def _same(trainer: Trainer, trials: Trials, way: Way, truth: Mapping[str, torch.Tensor]) -> bool:
    """Whether the first step of a way has autograd's gradients."""
    try:
        found = _first(trainer, trials, way)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    tolerance = 1e-8 if next(iter(found.values())).dtype == torch.float64 else 1e-2
    return all(
        bool((found[name] - slope).norm() <= tolerance * slope.norm() + 1e-12)
        for name, slope in truth.items()
    )


def alone(trainer: Trainer) -> Way:
    """The one way of a model by itself: the same recipe gives the same model, bit by bit."""
    if trainer.random and not trainer.coupled:
        return replace(ONE, together=True)  # all rows of a minibatch, so that trials share masks
    if not _layered(trainer):
        return ONE
    whole = Trials.whole(len(trainer.risk.data), [trainer.training.seed])
    layers = replace(ONE, make=Layers, name=Layers.name)
    return layers if _same(trainer, whole, layers, _first(trainer, whole, ONE)) else ONE


def fastest(trainer: Trainer, trials: Trials) -> Way:
    """The way with the least time for a step, among those that give autograd's gradients.

    Randomness and batch statistics need one model after the other.
    """
    if trainer.random or trainer.coupled:
        return alone(trainer)
    race = _Race(trainer, trials)
    for form in (Layers, Mapped) if _layered(trainer) else (Mapped,):
        _enter(race, form)
        if race.best.make is form:
            break
    return race.best


def _layered(trainer: Trainer) -> bool:
    """Whether the model is a sequence of layers that is written out by hand."""
    if trainer.random or trainer.coupled:
        return False
    objective = trainer.risk.objective.on(trainer.module(trainer.training.seed))
    inputs = trainer.rows.at(torch.tensor([0])).inputs
    if not (isinstance(inputs, tuple) and len(inputs) == 1 and isinstance(inputs[0], torch.Tensor)):
        return False
    return stages_of(objective, inputs[0].dim()) is not None


def _enter(race: _Race, form: type[Slopes]) -> None:
    """More and more models at once, until that is no faster."""
    first = Way(form, form.name, 1 if form is Layers else 2, together=False)
    common = int(np.unique(race.trials.seeds, return_counts=True)[1].max())
    best = _doubled(race, first, len(race.trials))
    if best.at_once > 1:  # in step with others, which keep as many rows
        for pool in {min(times * best.at_once, len(race.trials)) for times in POOLS}:
            # A pass works on copies.
            if pool > best.at_once and race.worth(pool + best.at_once):
                race.enter(replace(best, pool=pool))
    _doubled(race, replace(first, together=True), common)


def _doubled(race: _Race, way: Way, most: int) -> Way:
    """The fastest of a way's number of models and its doubles."""
    best, least, misses = way, math.inf, 0
    while way.at_once <= min(MOST, most) and misses < MISSES and race.worth(way.at_once):
        spent = race.enter(way)
        misses = 0 if spent < GAIN * least else misses + 1
        best, least = (way, spent) if spent < least else (best, least)
        way = replace(way, at_once=2 * way.at_once, pool=1)
    return best


def way_of(plan: Mapping[str, Any]) -> Way:
    """The way that a plan names."""
    forms: dict[str, type[Slopes]] = {form.name: form for form in (Single, Layers, Mapped)}
    form, at_once = plan["form"], plan["at_once"]
    return Way(forms[form], form, at_once, plan["together"], plan.get("pool", at_once))


def chunks(trials: Trials, way: Way, *, apart: bool = False) -> list[np.ndarray]:
    """Numbers of the trials to be trained together.

    Models of all data come first, each by itself.

    Args:
        trials: to be trained.
        way: how; of one seed where they share rows.
        apart: one seed at a time all the same.
    """
    whole = trials.whole_data()
    order = np.argsort(trials.seeds, kind="stable")
    order = order[~whole[order]]
    groups = [order]
    if way.together or apart:
        groups = [order[trials.seeds[order] == seed] for seed in np.unique(trials.seeds[order])]
    parts = [np.array_split(group, -(-len(group) // way.pool)) for group in groups if len(group)]
    return [*np.flatnonzero(whole)[:, None], *(part for some in parts for part in some)]
