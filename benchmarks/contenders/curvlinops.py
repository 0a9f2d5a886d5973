"""curvlinops: conjugate gradients on the generalised Gauss-Newton matrix, all queries at once.

For this model the Gauss-Newton matrix is the Hessian. The library has no scores; they are formed
here from its solutions in the cheapest way, as residual times projected features.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from curvlinops import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
)
from curvlinops.examples import IdentityLinearOperator
from torch import Tensor, nn


def _residual(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(x), 1) - F.one_hot(y, 10)


def run(problem: Any, *, batch: int, tolerance: float, steps: int, kfac: bool) -> Tensor:
    """Solve for all queries together, then one pass for the scores."""
    model = problem.model()
    params = list(model.parameters())
    data = list(zip(problem.inputs.split(batch), problem.labels.split(batch), strict=True))
    loss = nn.CrossEntropyLoss(reduction="mean")
    ggn = GGNLinearOperator(model, loss, params, data, check_deterministic=False)
    shapes = [tuple(p.shape) for p in params]
    one = IdentityLinearOperator(shapes, params[0].device, params[0].dtype)
    extra = {"preconditioner": _kfac(problem, model, loss, data)} if kfac else {}
    inverse = CGInverseLinearOperator(
        ggn + problem.l2 * one, tolerance=tolerance, max_iter=steps, **extra
    )
    slope = _residual(model, problem.query_inputs, problem.query_labels)
    rows = (slope[:, :, None] * problem.query_inputs[:, None, :]).flatten(1)
    solved = (inverse @ rows.T).T.reshape(len(rows) * 10, -1)
    blocks = []
    for x, y in data:
        projected = (x @ solved.T).view(len(x), -1, 10)
        blocks.append(torch.matmul(projected, _residual(model, x, y)[:, :, None])[..., 0].T)
    return torch.cat(blocks, 1) / len(problem.inputs)


def _kfac(problem: Any, model: nn.Module, loss: nn.Module, data: Any) -> Callable[[Tensor], Tensor]:
    """The library's own Kronecker factorisation, damped by λ, as a preconditioner."""
    made = KFACLinearOperator(
        model, loss, list(model.parameters()), data, fisher_type="type-2", check_deterministic=False
    )
    inverse = KFACInverseLinearOperator(made, damping=problem.l2, use_exact_damping=True)
    return lambda columns: inverse @ columns
