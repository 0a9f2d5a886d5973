"""What a user trained with, as one number and its gradient on chosen rows of the data."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from upweight.errors import DataError, LossError, ModelError, NonFiniteError, UpweightError
from upweight.parameters import ParameterSpace
from upweight.refusals import refuse_train_mode
from upweight.risk import Risk
from upweight.sources import leaves, map_leaves
from upweight.trainers.untouched import untouched

__all__ = ["Training", "gradient_of", "number", "training"]

KINDS = (
    "A training loss is a torch criterion (outputs, targets) -> scalar, a function (model, batch) "
    "-> scalar, a Hugging Face Trainer, or a LightningModule"
)


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """A LightningModule outside of its trainer has nowhere to log to."""
    names = [name for name in ("log", "log_dict") if hasattr(module, name)]
    own = {name: module.__dict__[name] for name in names if name in module.__dict__}
    try:
        for name in names:
            module.__dict__[name] = lambda *_args, **_settings: None
        yield
    finally:
        for name in names:
            module.__dict__.pop(name, None)
        module.__dict__.update(own)


@final
@dataclass(frozen=True)
class Training:
    """A user's training loss as a function of rows.

    Attributes:
        name: what to call it.
        modules: whose state is kept while it runs.
        call: positions ``[b]`` of rows -> what the user's code returns.
    """

    name: str
    modules: list[nn.Module]
    call: Callable[[Tensor], Any]

    def at(self, positions: Tensor, space: ParameterSpace) -> tuple[float, Tensor]:
        """Its value on some rows, and its gradient ``[p]`` in the chosen parameters.

        Raises:
            LossError: it fails, is no scalar tensor, changes the model or its mode.
            NonFiniteError: NaN or infinity.
        """
        with untouched(self.modules) as changes, torch.enable_grad():
            try:
                before = _accumulated(space)
                value = self._scalar(self.call(positions), len(positions))
                if _accumulated(space) != before:
                    raise LossError(
                        f"The training loss ({self.name}) runs backward() itself. Pass the loss "
                        "alone: return it before its backward pass."
                    )
                slope = gradient_of(value, space)
            except UpweightError:
                raise
            except Exception as error:
                raise LossError(
                    f"The training loss ({self.name}) failed on a batch of {len(positions)} rows: "
                    f"{type(error).__name__}: {str(error).rstrip('.')}. {KINDS}, where a batch is "
                    "what the data yields."
                ) from error
            self._refuse_other_mode()
        if changes.names:
            raise LossError(
                f"The training loss ({self.name}) changed {', '.join(changes.names[:3])}, which is "
                "put back. Pass the loss alone, without the optimiser's step."
            )
        if not bool(torch.isfinite(value)) or not bool(torch.isfinite(slope).all()):
            raise NonFiniteError(
                f"The training loss ({self.name}) or its gradient is not finite (value "
                f"{number(value)}) on a batch of {len(positions)} rows. Look for log(0), a "
                "division by a count of 0, or overflow."
            )
        return number(value), slope

    def _scalar(self, value: Any, rows: int) -> Tensor:
        """The loss out of what a training step returns."""
        if isinstance(value, Mapping) and "loss" in value:
            value = value["loss"]
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.reshape(())
        if isinstance(value, (float, int)):
            raise LossError(
                f"The training loss ({self.name}) returned the number {value!r}, which has no "
                "gradient to compare. Return the tensor, before .item()."
            )
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LossError(
            f"The training loss ({self.name}) must return one number for a batch of {rows} rows, "
            f"a scalar tensor; got {found}. Return what .backward() was called on."
        )

    def _refuse_other_mode(self) -> None:
        try:
            for module in self.modules:
                refuse_train_mode(module)
        except ModelError as error:
            raise LossError(
                f"The training loss ({self.name}) switched the model to train mode, where it is "
                "random or couples its rows. Leave the mode to the caller: dropout has no part in "
                "the objective."
            ) from error


def number(value: Tensor) -> float:
    """A scalar out of its graph."""
    return float(value.detach())


def gradient_of(value: Tensor, space: ParameterSpace) -> Tensor:
    """∇ of a scalar in the chosen parameters, ``[p]``; zero in what it does not depend on."""
    named = space.parameters()
    if not value.requires_grad:
        return torch.zeros_like(space.row())
    parts = torch.autograd.grad(
        value, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return space.flatten({n: part.detach() for n, part in zip(named, parts, strict=True)})


def _accumulated(space: ParameterSpace) -> list[tuple[int, int] | None]:
    """What tells whether a backward pass ran: gradients and how often they were written."""
    grads = [parameter.grad for parameter in space.parameters().values()]
    return [None if grad is None else (id(grad), grad._version) for grad in grads]


def _placed(raw: Any, space: ParameterSpace) -> Any:
    """A copy of a batch on the model's device in its dtype, of the loader's own type if it can."""
    raw = copy.deepcopy(raw)

    def move(leaf: Tensor) -> Tensor:
        return leaf.to(space.device, space.dtype if leaf.is_floating_point() else None)

    if all(move(leaf) is leaf for leaf in leaves(raw)):
        return raw
    return map_leaves(move, raw)


def _require_same_model(theirs: nn.Module, risk: Risk, name: str) -> None:
    own = {id(parameter) for parameter in theirs.parameters()}
    if not any(id(p) in own for p in risk.objective.space.parameters().values()):
        raise ModelError(
            f"{name} trains another module than the one explained: they share no parameter. "
            "Explain the module it holds, not a copy."
        )
    refuse_train_mode(theirs)


def _of_criterion(criterion: Any, risk: Risk, name: str) -> Training:
    objective = risk.objective

    def call(positions: Tensor) -> Any:
        batch, _ = risk.at(positions)
        return criterion(objective.call(batch), batch.targets)

    modules = [objective.model, *([criterion] if isinstance(criterion, nn.Module) else [])]
    return Training(name, modules, call)


def _of_function(function: Callable[[nn.Module, Any], Any], risk: Risk, name: str) -> Training:
    objective = risk.objective

    def call(positions: Tensor) -> Any:
        batch = _placed(risk.data.source.fetch(positions), objective.space)
        return function(objective.model, batch)

    return Training(name, [objective.model], call)


def _of_trainer(trainer: Any, risk: Risk, name: str) -> Training:
    model = getattr(trainer, "model", None) or risk.objective.model
    _require_same_model(model, risk, name)
    loader = trainer.get_train_dataloader()
    rows = getattr(loader, "dataset", None)
    if rows is None or isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
        raise DataError(
            f"The training data of {name} cannot be read by position. Pass a function (model, "
            "batch) -> scalar instead."
        )
    if len(rows) != len(risk.data):
        raise DataError(
            f"{name} trains on {len(rows)} examples and the objective is over {len(risk.data)}. "
            "Give both the same examples in the same order."
        )

    def call(positions: Tensor) -> Any:
        collated = loader.collate_fn([rows[i] for i in positions.tolist()])
        batch = _placed(dict(collated), risk.objective.space)
        if not hasattr(trainer, "get_batch_samples"):
            return trainer.compute_loss(model, batch)
        # The count of tokens a step is divided by, as the Trainer itself takes it.
        (batch,), items = trainer.get_batch_samples(iter([batch]), 1, risk.objective.space.device)
        return trainer.compute_loss(model, batch, num_items_in_batch=items)

    return Training(name, [risk.objective.model, model], call)


def _of_lightning(module: Any, risk: Risk, name: str) -> Training:
    _require_same_model(module, risk, name)
    if not getattr(module, "automatic_optimization", True):
        raise LossError(
            f"{name} optimises by hand inside training_step. Pass a function (model, batch) -> "
            "scalar that returns the loss alone."
        )
    takes_index = len(inspect.signature(module.training_step).parameters) > 1

    def call(positions: Tensor) -> Any:
        batch = _placed(risk.data.source.fetch(positions), risk.objective.space)
        with _silent(module):
            return module.training_step(batch, 0) if takes_index else module.training_step(batch)

    return Training(name, [risk.objective.model, module], call)


def training(loss: object, risk: Risk) -> Training:
    """A training loss from what a user has: a criterion, a function, a Trainer, a LightningModule.

    Functions of ``torch.nn.functional`` are criteria; any other function is (model, batch).

    Raises:
        LossError: it is none of these.
        ModelError: it trains another module, or one in train mode.
        DataError: its examples are not those of the objective.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    if loss is risk.objective.model and not hasattr(loss, "training_step"):
        raise LossError(
            f"The model itself is no training loss. {KINDS}; for a model that returns its loss: "
            "lambda model, batch: model(**batch).loss."
        )
    if isinstance(loss, type) or not (callable(loss) or hasattr(loss, "compute_loss")):
        got = f"the class {name}, not an object" if isinstance(loss, type) else repr(loss)
        raise LossError(f"{KINDS}; got {got}.")
    if hasattr(loss, "compute_loss") and hasattr(loss, "get_train_dataloader"):
        return _of_trainer(loss, risk, name)
    if hasattr(loss, "training_step"):
        return _of_lightning(loss, risk, name)
    plain: Any = loss.func if isinstance(loss, functools.partial) else loss
    if isinstance(loss, nn.Module) or getattr(plain, "__module__", "") == "torch.nn.functional":
        return _of_criterion(loss, risk, getattr(plain, "__name__", name))
    function: Any = loss
    return _of_function(function, risk, name)
