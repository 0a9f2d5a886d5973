"""Retraining by a user's own function, in processes of their own where that is possible."""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from upweight.bars import track
from upweight.errors import InputError
from upweight.fingerprints import fingerprint
from upweight.refusals import refuse_train_mode
from upweight.retraining.runs import Asked, Outcome, Run, distance
from upweight.retraining.trials import Trials

__all__ = ["ByFunction", "Own"]

Train = Callable[[np.ndarray, int], nn.Module]


@final
@dataclass(frozen=True)
class Own:
    """A training function of your own, and how to call it.

    The function is called in processes of one thread each. They start afresh and import the
    function, so that a script needs ``if __name__ == "__main__":`` around its work. A function that
    cannot be sent there (a lambda, one made in a notebook or inside another) is called in this
    process, one trial after the other, and the result says so.

    Stored outcomes belong to the function as it is: its code, the helpers and classes it uses, and
    the globals that it names. What libraries define counts by name alone.

    Attributes:
        train: (kept positions ``[n]``, seed) -> a trained model, in the mode to be asked in.
        seed: with which it makes the model at hand.
        processes: how many at once; by default one for each processor. 0 stays in this one.

    Raises:
        InputError: the training is no function, or there are fewer than no processes.

    Example:
        >>> Own(lambda positions, seed: nn.Linear(1, 1), processes=0).seed
        0
    """

    train: Train
    seed: int = 0
    processes: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.train):
            raise InputError(
                f"A training is a function (positions, seed) -> model, got {self.train!r}."
            )
        if self.processes is not None and self.processes < 0:
            raise InputError(f"processes is a number ≥ 0, got {self.processes!r}.")


@final
@dataclass(frozen=True)
class Found:
    """What a process says of one trial.

    Attributes:
        measured: ``[q]``, or None where it failed.
        moved: how far the model is from the one at hand.
        failure: what went wrong, or None.
    """

    measured: np.ndarray | None
    moved: float
    failure: str | None


@final
@dataclass(frozen=True)
class Job:
    """What every trial is asked, wherever it runs.

    Attributes:
        train: the user's function.
        asked: measures of the queries.
        known: parameters of the model at hand.
    """

    train: Train
    asked: Asked
    known: dict[str, Tensor]

    def run(self, kept: np.ndarray, seed: int) -> Found:
        """Train on kept positions ``[n]`` and measure; an error is an outcome too."""
        try:
            model = self.train(kept, seed)
            if not isinstance(model, nn.Module):
                raise InputError(
                    f"The training must return a torch.nn.Module, got {type(model).__name__}."
                )
            refuse_train_mode(model)
            named = {name: p.detach() for name, p in model.named_parameters() if name in self.known}
            return Found(self.asked.of(model), distance(named, self.known), None)
        except Exception as error:
            return Found(None, float("nan"), f"{type(error).__name__}: {error}")

    def packed(self) -> bytes | None:
        """Bytes for other processes, without the model itself; None where that cannot be."""
        try:
            queries = self.asked.queries.take(torch.arange(len(self.asked.queries)))
            return pickle.dumps(Job(self.train, self.asked.without_model(queries), self.known))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
            return None


_here: list[Job] = []
# Hashes of functions that changed what they name (a log, a cache), to those before their calls.
_before: dict[str, str] = {}


def _begin(packed: bytes) -> None:
    """Set a process up, from bytes that its parent has just made."""
    torch.set_num_threads(1)
    _here.append(ForkingPickler.loads(packed))


def _work(kept: np.ndarray, seed: int) -> Found:
    return _here[0].run(kept, seed)


def _ready() -> bool:
    return bool(_here)


def _starts(pool: ProcessPoolExecutor) -> bool:
    """Whether its processes could import the function; no call of it is to blame if not."""
    try:
        return pool.submit(_ready).result()
    except BrokenProcessPool:
        return False


def _processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


@final
class ByFunction(Run):
    """Calls a user's function for every trial, and the first of them twice.

    Args:
        asked: measures of the queries.
        own: the function.
    """

    def __init__(self, asked: Asked, own: Own) -> None:
        known = {name: value.cpu() for name, value in asked.objective.space.values().items()}
        self._job, self._own_settings = Job(own.train, asked, known), own
        self.own = own.seed
        self.words = f"trained by {getattr(own.train, '__name__', type(own.train).__name__)}"
        self._notes: list[str] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """Where it ran if not in processes of its own, and whether it is deterministic."""
        return tuple(self._notes)

    def identity(self) -> Any:
        """The function, by what it does; what its own calls changed in it does not count."""
        found = fingerprint(self._job.train)
        return _before.get(found, found)

    def outcomes(
        self, trials: Trials, wanted: np.ndarray, plan: Mapping[str, Any]
    ) -> Iterator[Outcome]:
        """As each trial is done.

        Raises:
            InputError: there are new labels, which a function of positions cannot take.
        """
        if trials.relabels is not None:
            raise InputError(
                "A function of positions and seed cannot give examples other labels. Relabel with "
                "a Training or Refit()."
            )
        del plan
        begun = self.identity()
        try:
            yield from self._outcomes(trials, wanted)
        finally:
            _before[fingerprint(self._job.train)] = begun

    def _outcomes(self, trials: Trials, wanted: np.ndarray) -> Iterator[Outcome]:
        # The first trial again, to see whether the function gives the same model twice.
        numbers = [wanted[0], *wanted]
        kept = [np.flatnonzero(~trials.gone[number]) for number in numbers]
        calls = list(zip(kept, trials.seeds[numbers].tolist(), strict=True))
        again: Found | None = None
        for place, found in track(self._found(calls), "retraining", len(calls)):
            if place == 0:
                again = found
            else:
                number = int(numbers[place])
                yield Outcome(number, found.measured, found.moved, found.failure)
            if place == 1:
                first = found
        if again is not None and again.measured is not None and first.measured is not None:
            self._compare(again.measured, first.measured)

    def _compare(self, one: np.ndarray, other: np.ndarray) -> None:
        apart = float(np.abs(one - other).max())
        if apart:
            self._notes.append(
                f"the function is not deterministic: two runs of one trial differ by up to "
                f"{apart:.2g}, which counts as noise"
            )

    def _found(self, calls: list[tuple[np.ndarray, int]]) -> Iterator[tuple[int, Found]]:
        """Place and result of every call."""
        wanted = self._own_settings.processes
        processes = min(_processors() if wanted is None else wanted, len(calls))
        packed = self._job.packed() if processes > (wanted is None) else None
        left = list(range(len(calls)))
        if packed is not None:
            pool = Pool(packed, processes)
            for place, found in pool.run(calls):
                left.remove(place)
                yield place, found
            if not left:
                return
            self._notes.append("called in this process, as others could not import the function")
        elif processes > 1:
            self._notes.append("called in this process, as the function cannot be sent to others")
        for place in left:
            yield place, self._job.run(*calls[place])


@final
class Pool:
    """Processes of one thread each that were started afresh.

    A process that dies takes those beside it along. Their calls are made again, each alone, and the
    one that kills its process once more has failed.

    Args:
        packed: the job.
        processes: how many.
    """

    def __init__(self, packed: bytes, processes: int) -> None:
        self._packed, self._processes = packed, processes

    def _executor(self, processes: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, context, _begin, (self._packed,))

    def run(self, calls: list[tuple[np.ndarray, int]]) -> Iterator[tuple[int, Found]]:
        """Results as they come; none at all where no process could start."""
        waiting = list(range(len(calls)))[::-1]
        while waiting:
            suspects: list[int] = []
            with self._executor(self._processes) as pool:
                if not _starts(pool):
                    return
                for place, found in self._fed(pool, calls, waiting):
                    if found is None:
                        suspects.append(place)
                    else:
                        yield place, found
            for place in suspects:
                yield place, self._alone(calls[place])

    def _fed(
        self, pool: ProcessPoolExecutor, calls: list[tuple[np.ndarray, int]], waiting: list[int]
    ) -> Iterator[tuple[int, Found | None]]:
        """Results of a pool with as many calls under way as processes; None where it broke."""
        running: dict[Future[Found], int] = {}
        broken = False
        while running or (waiting and not broken):
            while waiting and not broken and len(running) < self._processes:
                place = waiting.pop()
                try:
                    running[pool.submit(_work, *calls[place])] = place
                except BrokenProcessPool:
                    broken = True
                    yield place, None
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                place = running.pop(future)
                try:
                    yield place, future.result()
                except BrokenProcessPool:
                    broken = True
                    yield place, None

    def _alone(self, call: tuple[np.ndarray, int]) -> Found:
        with self._executor(1) as pool:
            try:
                return pool.submit(_work, *call).result()
            except BrokenProcessPool:
                said = "its process ended without an answer (killed, or out of memory)"
                return Found(None, float("nan"), said)
