"""Training models by a recipe, many at once where that is the faster way."""

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from upweight.checks import probe
from upweight.errors import LossError, ModelError
from upweight.objective import Objective
from upweight.refusals import refuse_train_mode
from upweight.retraining.minibatches import Minibatch, Minibatches, Rows
from upweight.retraining.slopes import Parts, Single, Slopes
from upweight.retraining.starts import begun
from upweight.retraining.training import Training
from upweight.retraining.trials import Trials
from upweight.risk import Risk

__all__ = ["Trainer", "Way"]

Blocks = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Way:
    """How models are trained: up to rounding, the same models come out.

    Attributes:
        make: from the objective of a module in train mode to what makes gradients.
        name: in words.
        at_once: models in one pass.
        together: whether they share the rows of a minibatch.
        pool: models in step; where these are more than ``at_once``, those in one pass are at every
            step others, with about as many rows.
    """

    make: Callable[[Objective], Slopes]
    name: str
    at_once: int
    together: bool
    pool: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", max(self.pool, self.at_once))

    def slopes(self, objective: Objective) -> Slopes:
        """What makes the gradients of all models in step."""
        made = self.make(objective)
        return made if self.pool == self.at_once else Parts(made, self.at_once)

    def words(self) -> str:
        """In one line, for results."""
        if self.pool == 1:
            return f"{self.name}, one after another"
        among = f" of {self.pool}" if self.pool > self.at_once else ""
        return f"{self.name}, {self.at_once}{among} at once"


KEPT = 8
ONE = Way(Single, Single.name, 1, together=False)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random state from a seed, inside; as it was, after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _decays(objective: Objective) -> dict[str, Tensor | float]:
    """λ of every block: a number, or a tensor where it varies inside one."""
    found: dict[str, Tensor | float] = {}
    for name, block in objective.space.unflatten(objective.l2).items():
        first = block.flatten()[0]
        found[name] = float(first) if bool((block == first).all()) else block
    return found


def _passes(risk: Risk, module: nn.Module) -> bool:
    """Whether rows have losses of their own under a module that is in train mode."""
    try:
        refuse_train_mode(module)
        probe(risk.objective.on(module), risk.data)
    except (ModelError, LossError):
        return False
    return True


@final
class Trainer:
    """Trains models of one form by a recipe.

    Args:
        risk: objective and training data.
        training: the recipe.

    Attributes:
        random: whether the model draws random numbers in train mode (dropout).
        coupled: whether the rows of a minibatch change each other there (batch statistics).

    Raises:
        ModelError: parameters that require gradients are not the objective's.
    """

    def __init__(self, risk: Risk, training: Training) -> None:
        self.risk, self.training, self.rows = risk, training, Rows(risk)
        objective = risk.objective
        trained = {name for name, p in objective.model.named_parameters() if p.requires_grad}
        others = sorted(trained - set(objective.space.shapes))
        if others:
            raise ModelError(
                f"The objective names only some of what a training changes: {', '.join(others)} "
                "require gradients too. Make the Objective of all of them, or freeze what was not "
                "trained with requires_grad_(False)."
            )
        self._begun: dict[int, nn.Module] = {}
        self._decays = _decays(objective)
        self.random, self.coupled = self._nature()

    def _nature(self) -> tuple[bool, bool]:
        module = copy.deepcopy(self.module(self.training.seed))
        if _passes(self.risk, module):
            return False, False
        for part in module.modules():
            if isinstance(part, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)):
                part.eval()
        return True, not _passes(self.risk, module)

    def module(self, seed: int) -> nn.Module:
        """The model where a training with this seed begins, in train mode."""
        if seed not in self._begun:
            if len(self._begun) >= KEPT:
                self._begun.pop(next(iter(self._begun)))
            self._begun[seed] = begun(self.risk.objective.model, self.training.start, seed)
        return self._begun[seed]

    def alike(self, seeds: Sequence[int]) -> bool:
        """Whether models of these seeds begin with the same buffers, as those trained at once."""
        some = [dict(self.module(seed).named_buffers()) for seed in sorted(set(seeds))[:2]]
        return all(torch.equal(value, some[-1][name]) for name, value in some[0].items())

    def _blocks(self, seeds: Sequence[int]) -> Blocks:
        """Parameters ``[m, *shape]`` at the start."""
        states = {seed: dict(self.module(seed).named_parameters()) for seed in set(seeds)}
        return {
            name: torch.stack([states[seed][name].detach() for seed in seeds])
            for name in self.risk.objective.space.shapes
        }

    def steps(self, trials: Trials, way: Way) -> Generator[tuple[Blocks, nn.Module], None, None]:
        """Parameters ``[m, *shape]`` with their gradients, and the module, after every step."""
        seeds, recipe = trials.seeds.tolist(), self.training
        blocks, module = self._blocks(seeds), self.module(seeds[0])
        if self.coupled:  # it may change its own statistics
            module = copy.deepcopy(module)
        slopes = way.slopes(self.risk.objective.on(module))
        optimiser, total = self._optimiser(blocks), recipe.steps(len(self.risk.data))
        batches = Minibatches(self.rows, recipe, trials)
        with _seeded(seeds[0]):
            for step, minibatch in enumerate(batches.steps(together=way.together)):
                self._attach(blocks, self._slopes(slopes, blocks, minibatch))
                for group in optimiser.param_groups:
                    group["lr"] = recipe.optimiser.lr * recipe.schedule(step, total)
                optimiser.step()
                yield blocks, module

    def _slopes(self, slopes: Slopes, blocks: Blocks, step: Minibatch) -> Sequence[Tensor]:
        """Gradients of a step; a row that only fills up must not reach batch statistics."""
        if self.coupled and not bool(step.shares.any()):
            return [torch.zeros_like(block) for block in blocks.values()]
        return slopes(blocks, step)

    def run(self, trials: Trials, way: Way) -> Iterator[nn.Module]:
        """Trained models in the mode of the model at hand, each good until the next.

        Yields:
            one module, with the parameters of each trial in turn.
        """
        ((blocks, module),) = deque(self.steps(trials, way), maxlen=1)
        model = copy.deepcopy(module)
        for one, known in zip(model.modules(), self.risk.objective.model.modules(), strict=True):
            one.training = known.training
        named = dict(model.named_parameters())
        for row in range(len(trials)):
            with torch.no_grad():
                for name, block in blocks.items():
                    named[name].copy_(block[row])
            yield model

    def _optimiser(self, blocks: Blocks) -> torch.optim.Optimizer:
        groups: dict[float, list[Tensor]] = {}
        for name, block in blocks.items():
            decay = self._decays[name]
            inside = isinstance(decay, float) and self.training.optimiser.couples_l2
            groups.setdefault(decay if inside else 0.0, []).append(block)  # type: ignore[arg-type]
        return self.training.optimiser.of(
            [{"params": params, "weight_decay": decay} for decay, params in groups.items()]
        )

    def _attach(self, blocks: Blocks, found: Sequence[Tensor]) -> None:
        """Give blocks their gradients, with L2 where the optimiser does not add it."""
        for (name, block), slope in zip(blocks.items(), found, strict=True):
            decay = self._decays[name]
            if isinstance(decay, Tensor):
                slope.addcmul_(decay, block)
            elif decay and not self.training.optimiser.couples_l2:
                slope.add_(block, alpha=decay)
            block.grad = slope
