"""curvlinops: the inverse of its (E)K-FAC times the gradients of the queries.

The library has no scores: gradients of single examples are formed with torch.func and contracted
with its solutions. Only Linear and Conv2d layers are covered; other parameters get no part.
"""

from typing import Any

import torch
from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from benchmarks.contenders.rows import gradient_rows


class ClassesFirst(nn.Module):
    """Outputs ``[n, s, c]`` of sequences as ``[n, c, s]``, where its cross-entropy looks for c."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs."""
        outputs: Tensor = self.model(inputs)
        return outputs.movedim(-1, 1)


def run(problem: Any, *, kind: str, fisher: str, batch: int, chunk: int) -> Tensor:
    """Fit, solve for all queries together, and contract.

    Args:
        problem: the task.
        kind: "ekfac" or "kfac" (the one that takes sequences).
        fisher: "type-2" for the exact curvature of the outputs, one backward pass per class; "mc"
            for one sampled label.
        batch: examples at once in fitting.
        chunk: examples at once whose gradients are formed.
    """
    model = problem.model()
    names = [
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for part, _ in module.named_parameters()
    ]
    params = dict(model.named_parameters())
    made = {"ekfac": EKFACLinearOperator, "kfac": KFACLinearOperator}[kind](
        ClassesFirst(model),
        nn.CrossEntropyLoss(reduction="mean"),
        [params[name] for name in names],
        problem.batches(batch),
        check_deterministic=False,
        fisher_type=fisher,
        separate_weight_and_bias=False,
        num_data=len(problem.inputs),
        num_per_example_loss_terms=problem.labels[0].numel(),
    )
    inverse = KFACInverseLinearOperator(made, damping=problem.damping, use_exact_damping=True)
    asked = gradient_rows(problem, model, names, (problem.query_inputs, problem.query_labels))
    solved = inverse @ asked.T
    blocks = [
        gradient_rows(problem, model, names, pair) @ solved for pair in problem.batches(chunk)
    ]
    return torch.cat(blocks).T / len(problem.inputs)
