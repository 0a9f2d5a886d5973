"""Retraining by a recipe."""

from collections.abc import Iterator
from typing import Any, final

from torch import nn

from upweight.bars import track
from upweight.data import Data
from upweight.objective import Objective
from upweight.retraining.choosing import chunks, fastest
from upweight.retraining.runs import Asked, Outcome, Run, distance
from upweight.retraining.starts import Fresh
from upweight.retraining.together import Trainer
from upweight.retraining.training import Training
from upweight.retraining.trials import Trials
from upweight.risk import Risk

__all__ = ["ByRecipe", "fit"]


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
    return next(trainer.run(whole, fastest(trainer, whole)))


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

    def identity(self) -> Any:
        """The recipe, and the values that it starts from or leaves as they are."""
        state = self._risk.objective.model.state_dict()
        training = self._trainer.training
        if isinstance(training.start, Fresh):
            trained = self._risk.objective.space.shapes
            state = {name: value for name, value in state.items() if name not in trained}
        return training, state

    def outcomes(self, trials: Trials) -> Iterator[Outcome]:
        """As each group of models is trained."""
        known = self._risk.objective.space.values()
        way = fastest(self._trainer, trials)
        parts = chunks(trials, way)
        for part in track(parts, f"retraining ({way.words()})", len(parts)):
            models = self._trainer.run(trials.take(part), way)
            for number, model in zip(part.tolist(), models, strict=True):
                named = dict(model.named_parameters())
                moved = distance({name: named[name].detach() for name in known}, known)
                yield Outcome(number, self._asked.of(model), moved)
