"""TRAK with one checkpoint, the final weights, on a CPU: its margin, its Gaussian projection.

Against exact scores only its correlations mean anything: it scores another function of the query.
For sequences, of which it has no model output, its margin is averaged over positions.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType


class SequenceMargin(AbstractModelOutput):
    """The mean over positions of log p / (1 − p)."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(
        model: nn.Module, weights: Any, buffers: Any, codes: Tensor, labels: Tensor
    ) -> Tensor:
        """The margin of one sequence ``[s]``."""
        logits = functional_call(model, (weights, buffers), (codes[None],))[0]
        right = logits.gather(1, labels[:, None])[:, 0]
        others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
        return (right - others).mean()

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Any, buffers: Any, batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The mean over positions of 1 − p, ``[n, 1]``."""
        chance = functional_call(model, (weights, buffers), (batch[0],)).softmax(2)
        return (1 - chance.gather(2, batch[1][..., None])).mean(1).detach()


def run(problem: Any, *, batch: int, dimension: int) -> Tensor:
    """Featurize the training examples, then score the queries.

    Args:
        problem: the task.
        batch: examples at once; each batch draws the whole projection anew.
        dimension: of the projected gradients, in two blocks: one block does not survive the
            library's own ``finalize_features``.
    """
    model = problem.model()
    projector = BasicProjector(
        grad_dim=sum(p.numel() for p in model.parameters()),
        proj_dim=dimension,
        seed=0,
        proj_type=ProjectionType.normal,
        device="cpu",
        block_size=dimension // 2,
    )
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model,
            "image_classification" if problem.labels.dim() == 1 else SequenceMargin(),
            len(problem.inputs),
            save_dir=folder,
            device="cpu",
            projector=projector,
            use_half_precision=False,
            logging_level=40,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for pair in problem.batches(batch):
            traker.featurize(batch=pair, num_samples=len(pair[0]))
        traker.finalize_features()
        asked = len(problem.query_inputs)
        traker.start_scoring_checkpoint("queries", model.state_dict(), 0, num_targets=asked)
        traker.score(batch=(problem.query_inputs, problem.query_labels), num_samples=asked)
        found = torch.tensor(traker.finalize_scores("queries"))
    return found.T
