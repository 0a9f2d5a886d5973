"""The command ``upweight``: signatures and help here; the work is imported when it is wanted."""

import importlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from upweight import __version__
from upweight.cli.options import Asked, Place
from upweight.cli.show import complain
from upweight.errors import UpweightError

__all__ = ["app", "main"]

FAILED, MISUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143

app = App(
    name="upweight",
    help="Which training examples made a model predict this, which of them are wrong, and how far "
    "that answer can be trusted. Start with 'upweight demo'.",
    version=__version__,
    result_action="return_value",
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
)


def _work(module: str) -> Any:
    """A module of commands: it brings torch, so it is imported only when a command runs."""
    return importlib.import_module(f"upweight.cli.{module}")


@app.command
def demo(*, place: Place | None = None, seed: int = 0) -> int:
    """Explain, audit and prove two models of handwritten digits, offline, within a minute.

    Trains softmax regression and a small network on digits of which 5 % carry a wrong label, asks
    what made them misread test digits, finds the wrong labels, really removes examples and refits,
    and writes a page with all of it.

    Args:
        place: where the page and the arrays go.
        seed: Draws the digits, the wrong labels and the network's first weights.
    """
    return int(_work("demo").demo(place or Place(), seed))


@app.command
def run(
    recipe: Path,
    /,
    *,
    place: Place | None = None,
    asked: Asked | None = None,
    dry_run: bool = False,
) -> int:
    """Explain, audit and prove your own model, and write a run directory with a page.

    Args:
        recipe: A Python file that defines model, train, queries and loss ('upweight new').
        place: where the run directory goes (./upweight-NAME of the recipe by default).
        asked: what is computed.
        dry_run: Only print what the run would cost.
    """
    return int(_work("run").run(recipe, place or Place(), asked or Asked(), dry_run=dry_run))


@app.command
def validate(
    recipe: Path,
    /,
    *,
    budget: str = "60 s",
    method: str = "exact",
    damping: float | Literal["auto"] = 0.0,
    truth: Path | None = None,
    place: Place | None = None,
) -> int:
    """Train models again for some time, and say how far the scores can be trusted.

    Times one training, spends the budget on the most telling trials that it affords, judges the
    scores and cheap baselines by the same trials, and writes evidence.json and a page.

    Args:
        recipe: A Python file that may also define training (a Training) or retrain (a function
            (positions, seed) -> model). Without either, models are refitted, which is for convex
            ones.
        budget: Seconds, or words like '10 min' or '2 h'.
        method: How influence is computed: see 'upweight methods'.
        damping: Added to the curvature beside the recipe's l2.
        truth: Directory that keeps every outcome, so that a longer call goes on from a shorter one
            (./upweight-NAME-truth by default).
        place: where the run directory goes (./upweight-NAME-evidence by default).
    """
    work = _work("validate")
    settings = work.Settings(budget, method, damping, truth)
    return int(work.validate(recipe, place or Place(), settings))


@app.command
def tune(
    recipe: Path,
    /,
    *,
    budget: str = "60 s",
    method: Annotated[list[str] | None, Parameter(negative="")] = None,
    truth: Path | None = None,
) -> int:
    """Train models again for some time, and choose the method and damping that predict them best.

    Half of what was found chooses; the other half says what is gained over the default damping.

    Args:
        recipe: A Python file that may also define training or retrain, as for 'upweight validate'.
        budget: Seconds, or words like '10 min' or '2 h'.
        method: One or several, the default first: see 'upweight methods' (exact by default). Each
            is tried with damping 'auto', which is the default's, and with others around the mean
            eigenvalue of its curvature.
        truth: Directory that keeps every outcome, shared with 'upweight validate'
            (./upweight-NAME-truth by default).
    """
    work = _work("tune")
    return int(work.tune(recipe, work.Settings(budget, method or ["exact"], truth)))


@app.command
def new(recipe: Path, /) -> int:
    """Write a recipe that runs as it is, to be filled with your own model.

    Args:
        recipe: The file to write; one that exists is left alone.
    """
    return int(_work("new").new(recipe))


@app.command
def doctor(recipe: Path | None = None, /) -> int:
    """Check this machine and, with a recipe, its model and data. Exit code 1 if a check fails.

    Args:
        recipe: Checked for determinism, coverage, and whether its model is at a minimum.
    """
    return int(_work("doctor").doctor(recipe))


@app.command
def export(
    directory: Path,
    /,
    *,
    out: Path = Path("influence_results.json"),
    layout: Annotated[Literal["ptif"], Parameter(name="--format")] = "ptif",
) -> int:
    """Write the scores of a run for programs that read another library's files.

    Args:
        directory: A run directory.
        out: The file to write.
        layout: ptif: JSON as pytorch_influence_functions writes it, with its lists of helpful and
            harmful examples the right way round.
    """
    return int(_work("export").export(directory, out, layout))


@app.command
def methods(recipe: Path | None = None, /, *, damping: float | Literal["auto"] = 0.0) -> int:
    """List the methods of 'upweight run --method': what they assume and when to use which.

    With a recipe: what each would cost with its model and data, or why it would be refused.

    Args:
        recipe: For which passes, seconds and memory of each method are estimated.
        damping: As of 'upweight run', for methods that need it.
    """
    return int(_work("methods").methods(recipe, damping))


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill cleans up as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(tokens: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: done. 1: the library refused, in one line on standard error. 2: the command line is wrong.
    130: interrupted.

    Args:
        tokens: words after ``upweight``; those of the process by default.
    """
    try:
        with _terminable():
            return app(tokens) or 0
    except CycloptsError:
        return MISUSED
    except UpweightError as error:
        complain(str(error))
        return FAILED
    except KeyboardInterrupt as stop:
        complain(" ".join(["Interrupted. Nothing was left half-written.", *map(str, stop.args)]))
        return INTERRUPTED
