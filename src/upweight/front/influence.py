"""The front: one object that explains, audits, predicts what-ifs and proves itself."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, final

from torch import nn

from upweight.checks import probe
from upweight.damping import Damping
from upweight.data import Data
from upweight.errors import InputError
from upweight.fingerprints import fingerprint
from upweight.front.changing import Changing
from upweight.front.choosing import Choosing
from upweight.front.proving import Proving
from upweight.objective import Objective
from upweight.plan import Plan, make_plan
from upweight.prepared import Prepared, answering, require_targets
from upweight.states import State, in_state, read_state
from upweight.tuning import Tuning

__all__ = ["Influence"]


@final
class Influence(Proving, Changing, Choosing):
    """Influence of training examples on a trained model.

    Nothing is computed until something is asked. The model is only read: it is bit-identical
    afterwards, also after an error.

    Args:
        model: a trained module, or an Objective (which then carries loss and l2).
        train: what it was trained on: Dataset, DataLoader, tensors or arrays, or a Data with ids.
        loss: a name, a torch criterion, or a callable (outputs, targets) -> ``[n]``.
        l2: λ of ½λ‖θ‖² in the objective, or a mapping of name patterns to λ.
        method: a row of ``METHODS``, a Method, a solver, or an inverse curvature with ``@``.
        damping: added to the curvature beside l2: a number, "auto", what a FiniteTraining says, or
            "validated": what ``tune`` is to choose.

    Raises:
        InputError: of the kind that tells which argument is at fault.

    Example:
        >>> import torch, upweight as uw
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 2
        >>> inf = uw.Influence(nn.Linear(3, 2), (x, y), loss="cross_entropy", l2=0.01)
        >>> len(inf.explain((x[:1], y[:1])).top(0, k=3))
        3
    """

    def __init__(
        self,
        model: nn.Module | Objective,
        train: Any,
        *,
        loss: object = None,
        l2: float | Mapping[str, float] = 0.0,
        method: object = "exact",
        damping: Damping = 0.0,
    ) -> None:
        if isinstance(model, Objective):
            if loss is not None or l2 != 0.0:
                raise InputError("The Objective already carries loss and l2. Pass them only there.")
            objective = model
        else:
            if loss is None:
                raise InputError("Say what was minimised: loss='cross_entropy', for example.")
            objective = Objective(model, loss, l2=l2)
        super().__init__(Prepared(objective, Data.of(train), method, damping))

    def __repr__(self) -> str:
        objective = self._made.whole
        return (
            f"Influence of {len(self.data):,} training examples on "
            f"{type(objective.model).__name__} ({objective.loss.name}, {objective.space.size:,} "
            f"parameters, {objective.space.coverage:.1%} of all; method {self.method.name}, "
            f"damping {self.damping})"
        )

    def keep(
        self,
        *,
        factors: str | PathLike[str] | None = None,
        gradients: str | PathLike[str] | None = None,
    ) -> "Influence":
        """Keep fitted factors and training gradients in directories, and take them from there.

        They are reused for the same model, data, loss and fit alone, whatever the damping and the
        queries. Gradients take what ``plan`` says of disk.

        Args:
            factors: for Kronecker-factored methods.
            gradients: for networks.

        Raises:
            InputError: something was computed already.
        """
        self._made.keep(factors, gradients)
        return self

    def at(self, state: State) -> "Influence":
        """The same questions of a copy of the model in another state; this model is left alone.

        What this one keeps on disk, the other keeps in a directory of its own inside.

        Args:
            state: of another checkpoint or seed: a state dict, or the path of one, in a file of
                safetensors or of ``torch.save``.

        Raises:
            InputError: it cannot be read, or is no state dict.
            ModelError: it is of another architecture.
        """
        made, found = self._made, read_state(state)
        other = Influence(
            made.whole.of(in_state(made.whole.model, found)),
            made.data,
            method=made.asked,
            damping=made.damping,
        )
        factors, gradients = made.kept_inside(fingerprint(dict(sorted(found.items()))))
        return other.keep(factors=factors, gradients=gradients)

    def tuned(self, tuning: Tuning) -> "Influence":
        """The same questions with the method and damping that retraining chose.

        It is the default's where no gain was shown (``tuning.chosen``). Nothing that this one keeps
        on disk is kept by the other until it is told to.

        Args:
            tuning: from ``tune``.
        """
        made, chosen = self._made, tuning.chosen
        return Influence(made.whole, made.data, method=chosen.method, damping=chosen.damping)

    @answering
    def plan(self, queries: Any) -> Plan:
        """Passes, seconds and memory per stage, from a timed probe, before anything runs.

        Raises:
            InputError: whatever would stop the run itself.
        """
        data = Data.of(queries)
        require_targets(self.objective, data, role="queries")
        probe(self.objective, data, role="queries")
        return make_plan(self._made, data)
