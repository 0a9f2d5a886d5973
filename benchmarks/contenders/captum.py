"""captum: TracIn with one checkpoint, the final weights: inner products of gradients, no curvature.

Against exact scores only its correlations mean anything: it has no inverse and so another scale.
"""

from typing import Any

from captum.influence import TracInCP, TracInCPFast
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Summed(nn.Module):
    """The task's losses, reduced by a sum or left as they are."""

    def __init__(self, problem: Any, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        self._losses = problem.losses

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """One number, or one per example."""
        losses: Tensor = self._losses(outputs, labels)
        return losses.sum() if self.reduction == "sum" else losses


def run(problem: Any, *, batch: int, kind: str) -> Tensor:
    """Scores of all pairs.

    Args:
        problem: the task.
        batch: training examples at once.
        kind: "last" for the gradients of the last layer (TracInCPFast); "hooks" for all Linear and
            Conv2d layers, from captured inputs and output gradients; "loop" for all parameters,
            one backward pass per example.
    """
    model = problem.model()
    train = DataLoader(TensorDataset(problem.inputs, problem.labels), batch_size=batch)
    given: dict[str, Any] = {
        "train_dataset": train,
        "checkpoints": ["final"],
        "checkpoints_load_func": lambda *_: 1.0,
        "loss_fn": Summed(problem, "none" if kind == "loop" else "sum"),
    }
    if kind == "last":
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        method = TracInCPFast(model, last, **given)
    else:
        method = TracInCP(model, sample_wise_grads_per_batch=kind == "hooks", **given)
    scores: Tensor = method.influence((problem.query_inputs, problem.query_labels))
    return scores.detach() / len(problem.inputs)
