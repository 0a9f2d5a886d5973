"""What a solve gives back: rows, how well each was solved, and why it stopped."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

from upweight.errors import IndefiniteError, NonFiniteError, NotConvergedError, UpweightError
from upweight.linalg.values import RowValues

__all__ = ["Solution", "Status", "Value", "indefinite", "relative_residual"]


Value = TypeVar("Value", Tensor, RowValues)


class Status(StrEnum):
    """Why the solve of one row stopped."""

    CONVERGED = "converged"
    NOT_CONVERGED = "not converged"
    NEGATIVE_CURVATURE = "negative curvature"
    DIVERGED = "diverged"
    ENDED = "ended as asked"


FLAT = 1e-10  # of the largest eigenvalue: nothing, up to rounding
_REMEDY: dict[Status, tuple[type[UpweightError], str]] = {
    Status.NOT_CONVERGED: (
        NotConvergedError,
        "Raise the number of steps, loosen the tolerance, add damping, or compute in float64 "
        "(model.double()).",
    ),
    Status.NEGATIVE_CURVATURE: (
        IndefiniteError,
        "The curvature bends down along a direction, so its inverse is not the answer to a "
        "removal. Add damping larger than its most negative eigenvalue, or use the GGN.",
    ),
    Status.DIVERGED: (
        NotConvergedError,
        "The iteration grew without bound. Raise the scale (or leave it to 'auto'), or add "
        "damping.",
    ),
}


@final
@dataclass(frozen=True)
class Solution(Generic[Value]):
    """Rows X that solve X A = B, row by row.

    Attributes:
        value: X, ``[m, p]``, as a tensor or in parts.
        residual: ‖b − A x‖ / ‖b‖ of each row, ``[m]``, measured and not estimated; NaN where it
            was not measured.
        status: why each row stopped.
        steps: iterations, or 0 for a direct solve.
        error: estimated relative error of each row, ``[m]``, where the solver is random.
        detail: of rows that did not converge: the rule that ended them, or how far A bends down.
    """

    value: Value
    residual: Tensor
    status: tuple[Status, ...]
    steps: int = 0
    error: Tensor | None = None
    detail: str = ""

    def caveats(self) -> tuple[str, ...]:
        """What a reader of results must know: the noise of a random solver, and failed rows."""
        found = []
        if self.error is not None and bool(torch.isfinite(self.error).any()):
            worst = float(self.error.nan_to_num().max())
            found.append(f"standard error of the solves ≤ {worst:.1%}")
        ended = [row for row, status in enumerate(self.status) if status == Status.ENDED]
        if ended:
            found.append(
                f"{len(ended)} of {len(self.status)} solves ended by {self.detail}, at relative "
                f"residuals up to {float(self.residual[ended].max()):.1e}"
            )
        failed = self._failed()
        if failed:
            kinds = ", ".join(sorted({self.status[row].value for row in failed}))
            found.append(f"{len(failed)} of {len(self.status)} solves accepted although {kinds}")
        return tuple(found)

    def _failed(self) -> list[int]:
        fine = (Status.CONVERGED, Status.ENDED)
        return [row for row, status in enumerate(self.status) if status not in fine]

    def require(self) -> Value:
        """The rows, if every one was solved.

        Raises:
            NotConvergedError, IndefiniteError: with the worst row's residual and the remedy.
        """
        failed = self._failed()
        if not failed:
            return self.value
        residual = self.residual[failed]
        worst = failed[int(torch.nan_to_num(residual, nan=torch.inf).argmax())]
        status = self.status[worst]
        kind, remedy = _REMEDY[status]
        raise kind(
            f"{len(failed)} of {len(self.status)} solves failed: {status.value} after {self.steps} "
            f"steps with relative residual {float(self.residual[worst]):.1e}. {remedy} "
            f"{self.detail}{' ' if self.detail else ''}"
            "Pass accept=True to keep the result all the same; it will say so."
        )


def indefinite(values: Tensor) -> str:
    """What to say of a curvature whose eigenvalues ``[p]``, ascending, are not all positive.

    Raises:
        NonFiniteError: they are no numbers.
    """
    least, largest = float(values[0]), float(values.abs().max())
    if least != least:
        raise NonFiniteError("The curvature is not finite. Look for NaN or overflow in the data.")
    if abs(least) <= FLAT * largest:
        what, damping = "singular: its smallest eigenvalue is 0 up to rounding", 1e-6 * largest
    else:
        what, damping = f"not positive definite: its smallest eigenvalue is {least:.3e}", -least
    return (
        f"The curvature is {what}. Add damping above {max(damping, 0.0):.1e} (state it: "
        "damping=...), add the l2 the model was trained with, or use a positive curvature "
        "(method='ggn')."
    )


def relative_residual(rhs: Tensor, product: Tensor) -> Tensor:
    """‖b − A x‖ / ‖b‖ per row ``[m]``; 0 for a zero right-hand side that is met."""
    norm = rhs.norm(dim=1)
    relative: Tensor = (rhs - product).norm(dim=1) / torch.where(norm > 0, norm, 1.0)
    return relative
