"""Retraining by a recipe."""

from collections.abc import Iterator
from typing import Any, final

from upweight.bars import track
from upweight.retraining.choosing import chunks, fastest
from upweight.retraining.runs import Asked, Outcome, Run, distance
from upweight.retraining.starts import Fresh
from upweight.retraining.together import Trainer
from upweight.retraining.training import Training
from upweight.retraining.trials import Trials
from upweight.risk import Risk

__all__ = ["ByRecipe"]


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
