"""Retraining by a recipe."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
from torch import nn

from upweight.bars import track
from upweight.data import Data
from upweight.errors import UpweightError
from upweight.forms import values_of
from upweight.objective import Objective
from upweight.retraining.choosing import alone, chunks, fastest, way_of
from upweight.retraining.runs import Asked, Outcome, Run, distance
from upweight.retraining.starts import Fresh
from upweight.retraining.together import Trainer, Way
from upweight.retraining.training import Training
from upweight.retraining.trials import Trials
from upweight.risk import Risk

__all__ = ["ByRecipe", "fit"]

ROUNDED = 1e-3


def fit(objective: Objective, train: Any, training: Training) -> nn.Module:
    """Train a copy of the objective's module by a recipe, with the recipe's own seed.

    ``Influence.retrain`` with the same recipe then answers for this very model.

    Args:
        objective: what is minimised, of a module of any weights.
        train: what it is trained on, as for ``Influence``.
        training: the recipe.

    Returns:
        The trained copy, in the mode of the module.

    Example:
        >>> import torch
        >>> from upweight.retraining import SGD
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> objective = Objective(nn.Linear(3, 2), "cross_entropy", l2=0.1)
        >>> fit(objective, (x, y), Training(2, 5, SGD(0.1)))
        Linear(in_features=3, out_features=2, bias=True)
    """
    risk = Risk(objective, Data.of(train))
    trainer, whole = Trainer(risk, training), Trials.whole(len(risk.data), [training.seed])
    return next(trainer.run(whole, alone(trainer)))


@final
class ByRecipe(Run):
    """Trains by a recipe, many models at once.

    Args:
        risk: objective and data.
        asked: measures of the queries.
        training: the recipe.

    Raises:
        ModelError: the recipe cannot train this model.
    """

    def __init__(self, risk: Risk, asked: Asked, training: Training) -> None:
        self._risk, self._asked = risk, asked
        self._trainer = Trainer(risk, training)
        self.own, self.words = training.seed, training.words()
        self._rounding, self._rounded = 0.0, False

    @property
    def notes(self) -> tuple[str, ...]:
        """What rounding does to a training, where that is not little."""
        said = (
            "training is chaotic here: rounding alone, of the same training with its sums in "
            f"another order, moves measures by up to {self._rounding:.2g}"
        )
        return (said,) if self._rounded else ()

    def identity(self) -> Any:
        """The recipe, and the values that it starts from or leaves as they are."""
        state = dict(values_of(self._risk.objective.model))
        training = self._trainer.training
        if isinstance(training.start, Fresh):
            trained = self._risk.objective.space.shapes
            state = {name: value for name, value in state.items() if name not in trained}
        return training, state

    def plan(self, trials: Trials, known: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The way that is fastest here, unless one is known."""
        if known:
            return known
        way = fastest(self._trainer, trials)
        return {
            "form": way.name,
            "at_once": way.at_once,
            "together": way.together,
            "pool": way.pool,
        }

    def outcomes(
        self, trials: Trials, wanted: np.ndarray, plan: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        """As each group of models is trained."""
        way, one = way_of(plan), alone(self._trainer)
        parts = chunks(trials, way, apart=not self._trainer.alike(trials.seeds.tolist()))
        seeds = set(trials.seeds[trials.whole_data()].tolist())
        several = (p for p, part in enumerate(parts) if len(part) > 1)
        first = next((p for p in several if int(trials.seeds[parts[p][0]]) in seeds), -1)
        whole: dict[int, np.ndarray] = {}
        for place, part in track(enumerate(parts), f"retraining ({way.words()})", len(parts)):
            if not np.isin(part, wanted).any():
                continue
            some = trials.take(part)
            if some.whole_data().all():
                for outcome in self._trained(some, one, part):
                    assert outcome.measured is not None
                    whole[int(some.seeds[0])] = outcome.measured
                    yield outcome
            elif place == first:
                yield from self._compared(some, way, part, whole)
            else:
                yield from self._trained(some, way, part)

    def _trained(self, some: Trials, way: Way, part: np.ndarray) -> Iterator[Outcome]:
        """Outcomes of trials that have the numbers ``part``; one may fail by itself."""
        try:
            yield from self._measured(some, way, part)
        except UpweightError:
            raise
        except Exception as error:
            if len(part) > 1 or some.whole_data().any():
                raise
            yield Outcome(int(part[0]), None, failure=f"{type(error).__name__}: {error}")

    def _measured(self, some: Trials, way: Way, part: np.ndarray) -> Iterator[Outcome]:
        known = self._risk.objective.space.values()
        models = self._trainer.run(some, way)
        for number, model in zip(part.tolist(), models, strict=True):
            named = dict(model.named_parameters())
            moved = distance({name: named[name].detach() for name in known}, known)
            yield Outcome(number, self._asked.of(model), moved)

    def _compared(
        self, some: Trials, way: Way, part: np.ndarray, whole: Mapping[int, np.ndarray]
    ) -> Iterator[Outcome]:
        """The same, with all of the data among them, which another way has trained before."""
        seed = int(some.seeds[0])
        again = Trials.whole(some.gone.shape[1], [seed]).then(some)
        # In a pool it is not what the others are filled up to.
        wider = way if way.together else replace(way, pool=way.pool + 1)
        for outcome in self._trained(again, wider, np.concatenate([[-1], part])):
            if outcome.number >= 0:
                yield outcome
            elif seed in whole and outcome.measured is not None:
                self._rounding = float(np.abs(outcome.measured - whole[seed]).max())
                self._rounded = self._rounding > ROUNDED * float(np.abs(whole[seed]).max())
