"""kronfluence: EK-FAC factors of all Linear and Conv2d layers, then its pairwise scores.

Its Fisher is that of summed losses: for sequences of s positions the loss is the sum over them, as
in the library's own language examples, so that λ becomes s λ there and the scores s times ours.
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset


class Summed(Task):
    """Cross-entropy, summed; with labels sampled from the model where the library asks so."""

    def compute_train_loss(
        self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        """The library's name for it."""
        outputs = model(batch[0]).flatten(0, -2)
        labels = batch[1].flatten()
        if sample:
            with torch.no_grad():
                labels = torch.multinomial(torch.softmax(outputs, -1), 1).flatten()
        return F.cross_entropy(outputs, labels, reduction="sum")

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        """The loss of the queries."""
        return self.compute_train_loss(batch, model)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Batches fetched whole: collating thousands of rows would be charged to the library."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self._pair = (inputs, labels)

    def __len__(self) -> int:
        return len(self._pair[0])

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self._pair[0][row], self._pair[1][row]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """What the loader asks for first."""
        return self._pair[0][rows], self._pair[1][rows]


def run(problem: Any, *, batch: int, damping: float | str | None) -> Tensor:
    """Fit and score.

    Args:
        problem: the task.
        batch: examples at once, in fitting and in scoring.
        damping: added to the eigenvalues: a number, None for the library's heuristic (a tenth of
            a layer's mean eigenvalue), "score" for the λ of the task's score.
    """
    torch.manual_seed(0)
    positions = problem.labels[0].numel()
    model = prepare_model(problem.model(), Summed())
    train = Rows(problem.inputs, problem.labels)
    queries = Rows(problem.query_inputs, problem.query_labels)
    factor = positions * problem.damping if damping == "score" else damping
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "run", model, Summed(), cpu=True, disable_tqdm=True, output_dir=folder, log_level=40
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda pair: pair))
        analyzer.fit_all_factors("ekfac", train, per_device_batch_size=batch)
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            queries,
            train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=factor),
        )
        scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores / (positions * len(train))
