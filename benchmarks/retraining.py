"""Many retrainings: upweight's engine against a loop of plain torch trainings, on one thread.

    python -m benchmarks.retraining [TASK ...]

The loop is torch as one writes it: kept rows of each minibatch, the module, its criterion,
``backward``, and an optimiser of torch.optim whose weight decay is the L2. Some of the trainings
are done so, and their time is scaled up. Both train the same models: the largest gap between the
queries' losses after one training in float64 is written beside (in float32 long trainings amplify
rounding). What torch imports for its first optimiser is in neither time. The bound is arithmetic
alone, two operations for every multiply-add of the forward and backward passes over the examples
that are kept, at the rate of a large float32 product in the same process. Results are written to
results/retraining.json and .md, and into docs/benchmarks.md.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw
from benchmarks import report
from benchmarks.datasets import digits
from benchmarks.harness import RESULTS, _commit, machine, write_docs
from reproduce.network import Network
from upweight.retraining import choosing, retrain
from upweight.retraining.starts import begun
from upweight.retraining.together import Trainer

SIDE, LOOPED, L2 = 1024, 6, 1e-3


def untrained(seed: int) -> Mapping[str, Tensor]:
    """The network of Figure 2 draws its weights itself."""
    return Network(seed).state_dict()


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def halves(count: int, seeds: int) -> Callable[[int], uw.Trials]:
    return lambda n: uw.Trials.subsets(n, count=count, fraction=0.5, seeds=range(seeds))


def singles(count: int) -> Callable[[int], uw.Trials]:
    return lambda n: uw.Trials.without([[i] for i in range(count)], n, seeds=[0])


@dataclass(frozen=True)
class Task:
    """What is trained, and how often.

    Attributes:
        build: the network.
        training: its recipe.
        examples: of MNIST.
        trials: of so many examples.
        products: multiply-adds of a forward and a backward pass over one example.
    """

    build: Callable[[], nn.Module]
    training: uw.Training
    examples: int
    trials: Callable[[int], uw.Trials]
    products: int


def figure_2(batch: int, epochs: int, examples: int, count: int) -> Task:
    """The convolutional network of the paper, 2,616 parameters, with Adam."""
    training = uw.Training(epochs, batch, uw.Adam(1e-3), start=untrained)
    # Outputs of each layer times what each takes; the first needs no gradient of its inputs.
    first, rest = 26 * 26 * 72, 144 * 576 + 100 * 576 + 16 * 576 + 4 * 576 + 4 * 80 + 100
    return Task(lambda: Network(0), training, examples, halves(count, 1), 2 * first + 3 * rest)


DECAYED = uw.Training(10, 64, uw.SGD(0.05, momentum=0.9))
SOFTMAX, LARGE, SMALL = 784 * 10, 784 * 256, 256 * 128 + 128 * 10
TASKS = {
    "perceptron": Task(perceptron, DECAYED, 6_000, halves(60, 3), 2 * LARGE + 3 * SMALL),
    "softmax": Task(lambda: nn.Linear(784, 10), DECAYED, 6_000, halves(60, 3), 2 * SOFTMAX),
    "softmax, one out": Task(lambda: nn.Linear(784, 10), DECAYED, 6_000, singles(180), 2 * SOFTMAX),
    "cnn, batches of 2": figure_2(2, 2, 1_000, 240),
    "cnn, batches of 8": figure_2(8, 2, 1_000, 240),
    "cnn, batches of 32": figure_2(32, 2, 1_000, 120),
    "cnn, batches of 500": figure_2(500, 1, 5_500, 100),
}


def rate() -> float:
    """Operations a second of a float32 product of two square matrices."""
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    spent = []
    for _ in range(12):
        start = time.process_time()
        _ = left @ right
        spent.append(time.process_time() - start)
    return 2 * SIDE**3 / min(spent[2:])


def by_torch(model: nn.Module, pair: tuple[Tensor, Tensor], task: Task, trial: uw.Trials) -> None:
    """Train a model on what one trial keeps."""
    (x, y), recipe, kept = pair, task.training, torch.from_numpy(~trial.gone[0])
    rule: Any = recipe.optimiser
    more = {"momentum": rule.momentum} if isinstance(rule, uw.SGD) else {}
    made = getattr(torch.optim, type(rule).__name__)
    optimiser = made(model.parameters(), rule.lr, weight_decay=L2, **more)
    for epoch in range(recipe.epochs):
        for batch in recipe.epoch(int(trial.seeds[0]), epoch, len(x)).split(recipe.batch_size):
            rows = batch[kept[batch]]
            optimiser.zero_grad(set_to_none=len(rows) > 0)
            if len(rows):
                F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()


def loop(task: Task, pair: tuple[Tensor, Tensor], trial: uw.Trials) -> tuple[float, nn.Module]:
    """CPU seconds of a training by plain torch, and its model."""
    model = begun(task.build().to(pair[0].dtype), task.training.start, int(trial.seeds[0]))
    start = time.process_time()
    by_torch(model, pair, task, trial)
    return time.process_time() - start, model


def engine(
    task: Task, pair: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], trials: uw.Trials
) -> tuple[float, np.ndarray, str]:
    """CPU seconds of a training by upweight, losses ``[m, q]``, and how it chose to train."""
    objective = uw.Objective(task.build().to(pair[0].dtype), "cross_entropy", l2=L2)
    start = time.process_time()
    risk = uw.Risk(objective, uw.Data.of(pair))
    truth = retrain(risk, uw.Data.of(asked), trials, task.training)
    spent = time.process_time() - start
    way = choosing.fastest(Trainer(risk, task.training), trials)
    words = way.words() + ", shared rows" * way.together
    return spent / (len(trials) + len(truth.seeds)), truth.measured, words


def gap(task: Task, pair: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor]) -> float:
    """How far the queries' losses are apart after one training both ways, in float64."""
    trials = task.trials(task.examples).take(np.array([0]))
    pair, asked = ((x.double(), y) for x, y in (pair, asked))
    found = engine(task, pair, asked, trials)[1][0]
    _, model = loop(task, pair, trials)
    with torch.no_grad():
        outputs = model(asked[0])
        wanted = F.cross_entropy(outputs, asked[1], reduction="none").numpy()
    return float(np.abs(found - wanted).max())


def measure(task: Task) -> dict[str, Any]:
    """Costs of one task both ways, and how far they are from arithmetic."""
    arrays = {k: torch.from_numpy(v) for k, v in digits("mnist", task.examples, (784,)).items()}
    pair = (arrays["inputs"], arrays["labels"])
    asked = (arrays["query_inputs"], arrays["query_labels"])
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # imports once, for both
    speed, trials = rate(), task.trials(task.examples)
    ours, _, way = engine(task, pair, asked, trials)
    plain = float(np.mean([loop(task, pair, trials.take(np.array([k])))[0] for k in range(LOOPED)]))
    kept = float((~trials.gone).sum(1).mean())
    bound = 2 * task.products * kept * task.training.epochs / speed
    return {
        "recipe": task.training.words(),
        "trials": f"{len(trials)} x {trials.kind}",
        "way": way,
        "cpu_s_each": round(ours, 4),
        "cpu_s_each_torch_loop": round(plain, 4),
        "times_faster": round(plain / ours, 2),
        "gflops_of_sgemm": round(speed / 1e9, 1),
        "arithmetic_bound_s_each": round(bound, 4),
        "times_bound": round(ours / bound, 2),
        "largest_gap_of_losses_float64": float(f"{gap(task, pair, asked):.1e}"),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "torch": torch.__version__,
        "machine": machine(),
    }


PAGE = """# Many retrainings

Models trained again by `Influence.retrain`, each without some of its examples, against a loop of
plain torch trainings: the same module, minibatches, criterion and optimiser, one model after the
other. CPU seconds of one training, on one thread; the bound is the arithmetic of the kept examples'
forward and backward passes at the rate of a large float32 product. The gap is that of the queries'
losses after one training both ways in float64.

| models | trained | recipe | CPU s each | torch loop | times faster | x bound | gap | how |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |
"""


def page(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a task."""
    lines = []
    for name, one in measured.items():
        numbers = (
            f"{one['cpu_s_each']:.4f} | {one['cpu_s_each_torch_loop']:.4f} | "
            f"{one['times_faster']:.2f} | {one['times_bound']:.2f} | "
            f"{one['largest_gap_of_losses_float64']:.0e}"
        )
        lines.append(f"| {name} | {one['trials']} | {one['recipe']} | {numbers} | {one['way']} |")
    places = {
        f"{one['machine']['cpu']}, {one['machine']['cores']} cores, one thread, torch "
        f"{one['torch']}, {one['date']}, commit {one['commit']}": None
        for one in measured.values()
    }
    said = "Measured on\n\n" + "\n".join(f"- {place}" for place in places)
    made = "Made by `python -m benchmarks.retraining`; do not edit."
    return PAGE + "\n".join(lines) + f"\n\n{said}\n\n{made}\n"


def main() -> None:
    """Measure tasks and store each as soon as it is done."""
    parser = argparse.ArgumentParser(description="Retrainings against a loop of plain torch.")
    parser.add_argument("task", nargs="*", help=f"of {', '.join(TASKS)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "retraining.json"
    for name in given.task or TASKS:
        found = measure(TASKS[name])
        print(name, json.dumps(found, indent=1), flush=True)
        known = report.read(path) | {name: found}
        known = {key: known[key] for key in TASKS if key in known}
        report.dump(path, known)
        path.with_suffix(".md").write_text(page(known))
        write_docs()


if __name__ == "__main__":
    main()
