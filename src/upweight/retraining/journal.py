"""Outcomes of retraining, kept in a directory as soon as each is there."""

import json
import os
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import numpy as np

from upweight.errors import StoreError
from upweight.store import claim, locked, open_array, read_array, write_array
from upweight.tables import atomic_write

__all__ = ["Journal"]

MODEL, NOTES = "model.txt", "notes"
ARRAYS: dict[str, Any] = {"measured": np.dtype(np.float64), "written": np.dtype(np.uint32)}


def _mark(key: str, row: np.ndarray) -> int:
    """A checksum of a row and whose it is, never 0, which stands for a row that is not there."""
    return zlib.crc32(row.tobytes(), zlib.crc32(key.encode())) or 1


@final
class Journal:
    """What trials found, by what each trial is.

    The directory holds four files for every time that new trials were asked for: ``keys-k.npy``
    ``[m]`` names them, ``measured-k.npy`` ``[m, q + 1]`` holds what was found, with how far each
    model moved in the last column, ``written-k.npy`` ``[m]`` a checksum of every row that is there
    and of its name, 0 elsewhere, and ``plan-k.json`` how they are run, so that what a killed run
    left is made as it would have been, and what was said of them. Whatever ends the process, what
    was put stays; trials of any design that are here are not run again. One run at a time has the
    directory, until it closes the journal or ends in any way.

    Args:
        directory: made if it is absent; None keeps outcomes in memory alone.
        identity: hash of what outcomes rest on; a directory of another is refused.
        queries: q.

    Attributes:
        known: rows ``[q + 1]`` by the keys of their trials.

    Raises:
        StoreError: the directory belongs to something else, is in use by another process, or
            cannot be read or written.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None, identity: str, queries: int
    ) -> None:
        self._width = queries + 1
        self._place: Path | None = None
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._rooms: dict[str, tuple[int, int]] = {}
        self._plans: dict[int, dict[str, Any]] = {}
        self.known: dict[str, np.ndarray] = {}
        self._let_go: Callable[[], object] | None = None
        if directory is not None:
            self._hold(Path(directory).absolute())
            self._place = claim(directory, identity, kind="retraining")
            while self._file("keys", len(self._arrays)).exists():
                keys = read_array(self._file("keys", len(self._arrays)), mapped=False)
                self._open(keys.tolist())

    def _hold(self, place: Path) -> None:
        """Keep other processes out; what cannot be a directory is claim's to refuse."""
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
        held = locked(place) if place.is_dir() else None
        if held is not None:
            self._let_go = weakref.finalize(self, os.close, held)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *failed: object) -> None:
        """Leave the directory to others."""
        if self._let_go is not None:
            self._let_go()

    def claimed(self, model: str) -> bool:
        """Whether distances here are from this very model, by its hash: from the first one's."""
        if self._place is None:
            return True
        path = self._place / MODEL
        if not path.exists():
            atomic_write(path, model.encode())
        return path.read_text() == model

    def plan(self, number: int) -> Mapping[str, Any] | None:
        """How the trials that were asked for at a time are run, if that was noted.

        Raises:
            StoreError: it was, and is damaged.
        """
        found = self._noted(number)
        return found and {name: value for name, value in found.items() if name != NOTES}

    def note(self, number: int, plan: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
        """Keep how the trials that were asked for at a time are run, and what is said of it."""
        known = (self._noted(number) or {}).get(NOTES, [])
        noted = {**plan, NOTES: list(dict.fromkeys([*known, *notes]))}
        if self._place is None:
            self._plans[number] = noted
        else:
            atomic_write(self._plan(number), json.dumps(noted).encode())

    def notes(self, keys: Sequence[str]) -> tuple[str, ...]:
        """What was said of the times at which some trials were asked for."""
        times = sorted({self._rooms[key][0] for key in keys})
        said = [(self._noted(time) or {}).get(NOTES, []) for time in times]
        return tuple(dict.fromkeys(text for texts in said for text in texts))

    def _noted(self, number: int) -> dict[str, Any] | None:
        if self._place is None or not self._plan(number).exists():
            return self._plans.get(number)
        try:
            found = json.loads(self._plan(number).read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        except (OSError, ValueError):
            pass
        raise StoreError(
            f"{self._plan(number)} is damaged: it says how trainings are run. Delete {self._place} "
            "and run again."
        )

    def _plan(self, number: int) -> Path:
        assert self._place is not None
        return self._place / f"plan-{number}.json"

    def _file(self, kind: str, number: int) -> Path:
        assert self._place is not None
        return self._place / f"{kind}-{number}.npy"

    def _open(self, keys: list[str]) -> None:
        """Take up the next files: rows that are there, and room for those that are not."""
        number = len(self._arrays)
        shapes = ((len(keys), self._width), (len(keys),))
        measured, written = (
            open_array(self._file(kind, number), shape, dtype)
            for (kind, dtype), shape in zip(ARRAYS.items(), shapes, strict=True)
        )
        self._arrays.append((measured, written))
        for row, key in enumerate(keys):
            self._rooms[key] = (number, row)
            if written[row] and written[row] == _mark(key, measured[row]):
                self.known[key] = np.array(measured[row])

    def expect(self, keys: Sequence[str]) -> None:
        """Make room for the outcomes of trials that were not asked for before.

        Raises:
            StoreError: there is no room.
        """
        new = [key for key in keys if key not in self._rooms]
        if self._place is None or not new:
            self._rooms |= {key: (0, row) for row, key in enumerate(new)}
            return
        number = len(self._arrays)
        for kind in ARRAYS:  # of a run that was killed before it named them
            self._file(kind, number).unlink(missing_ok=True)
        self._open(new)
        part = self._place / f".keys-{number}.{os.getpid()}.npy"
        try:
            write_array(part, np.array(new))
            part.replace(self._file("keys", number))
        except OSError as error:
            raise StoreError(f"Cannot write {part}: {error.strerror}. Free some space.") from error

    def unfinished(self, keys: Sequence[str]) -> dict[int, list[str]]:
        """Keys by the time that they were asked for, where some have no outcome yet."""
        groups: dict[int, list[str]] = {}
        for key in sorted(keys, key=self._rooms.__getitem__):
            groups.setdefault(self._rooms[key][0], []).append(key)
        return {k: group for k, group in groups.items() if not set(group) <= self.known.keys()}

    def put(self, key: str, measured: np.ndarray, moved: float) -> None:
        """Keep an outcome ``[q]``, and how far its model moved."""
        row = np.append(measured, moved)
        self.known[key] = row
        if self._place is not None:
            number, place = self._rooms[key]
            rows, written = self._arrays[number]
            rows[place] = row
            written[place] = _mark(key, row)
