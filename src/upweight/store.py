"""Run directories: complete or absent, never unpickled, never reused for another run."""

import errno
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from upweight.errors import StoreError
from upweight.tables import atomic_write

if sys.platform != "win32":
    import fcntl

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "claim",
    "locked",
    "open_array",
    "plain",
    "publish",
    "read_array",
    "read_manifest",
    "require_place",
    "resume",
    "write_array",
    "write_manifest",
]

SCHEMA = 1
MANIFEST = "manifest.json"
# What file systems say that cannot take room before it is needed.
UNABLE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def plain(value: Any) -> Any:
    """JSON values: lists for tuples, None for what is not finite.

    Example:
        >>> plain({"a": (1, float("nan"))})
        {'a': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` with the schema version."""
    text = json.dumps({"schema": SCHEMA, **content}, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(directory / MANIFEST, text.encode())


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``manifest.json``.

    Raises:
        StoreError: there is none, it is damaged, or a newer version wrote it.
    """
    path = Path(directory) / MANIFEST
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(
            f"{directory} is not a run of upweight: no readable {MANIFEST}."
        ) from error
    except ValueError as error:
        raise StoreError(
            f"{path} is damaged ({error}). Delete the directory and run again."
        ) from error
    if content.get("schema") != SCHEMA:
        raise StoreError(
            f"{path} has schema {content.get('schema')}, this version reads {SCHEMA}. "
            "Use the version that wrote it, or run again."
        )
    return content


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as ``.npy`` without pickles."""
    np.save(path, array, allow_pickle=False)


def read_array(path: Path, *, mapped: bool = True) -> np.ndarray:
    """Read an ``.npy`` array, memory-mapped, never unpickled.

    Raises:
        StoreError: absent or damaged.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} is absent or damaged ({error}). Run again.") from error
    return array


def open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A memory-mapped ``.npy`` array to write into: the one that is there, or a new one of zeros.

    Raises:
        StoreError: there is another array, or no room for this one.
    """
    known = path.exists()
    try:
        mode: Literal["r+", "w+"] = "r+" if known else "w+"
        made = {} if known else {"dtype": dtype, "shape": shape}
        found = np.lib.format.open_memmap(path, mode=mode, **made)  # type: ignore[arg-type]
    except (OSError, ValueError) as error:
        raise StoreError(f"Cannot write {path}: {error}.") from error
    if found.shape != shape or found.dtype != dtype:
        raise StoreError(
            f"{path} is {found.dtype}{list(found.shape)}, and {dtype}{list(shape)} is to be "
            "written. Delete it, and run again."
        )
    try:
        _reserve(path)
    except OSError as error:
        if not known:
            path.unlink(missing_ok=True)
        raise StoreError(f"Cannot write {path}: {error.strerror}. Free some space.") from error
    return found


def _reserve(path: Path) -> None:
    """Take the room of a file now: a later write to a full disk would end the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in UNABLE:
            raise


def _check_target(target: Path, identity: str, *, replace: bool) -> None:
    """Refuse to write over anything but an earlier result of the same run."""
    if not target.exists():
        return
    if not target.is_dir():
        raise StoreError(f"{target} is a file. Choose another output directory.")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST).exists():
        raise StoreError(
            f"{target} is not empty and not a run of upweight. Choose another output directory."
        )
    found = read_manifest(target).get("identity")
    if found != identity and not replace:
        raise StoreError(
            f"{target} belongs to another run (identity {found}, this one is {identity}: model, "
            "data or settings differ). Choose another directory, or replace it (replace=True, "
            "--replace on the command line)."
        )


@contextmanager
def publish(
    target: str | os.PathLike[str], identity: str, *, replace: bool = False
) -> Iterator[Path]:
    """A directory to write into, which becomes ``target`` when the block ends without an error.

    Args:
        target: where the run is to stand.
        identity: hash of model, data and settings; a directory of another identity is refused.
        replace: write over a run of another identity all the same.

    Raises:
        StoreError: the place belongs to something else, or cannot be written.
    """
    place = Path(target).absolute()
    part = _beside(place, identity, replace=replace)
    try:
        with _written(place):
            yield part
            _swap(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_place(target: str | os.PathLike[str], identity: str) -> None:
    """Refuse before the work what ``publish`` would refuse after it.

    Raises:
        StoreError: the place belongs to something else, or cannot be written.
    """
    _beside(Path(target).absolute(), identity, replace=False).rmdir()


def _beside(place: Path, identity: str, *, replace: bool) -> Path:
    """A new directory beside a place that may be written."""
    _check_target(place, identity, replace=replace)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".part", dir=place.parent))
    except OSError as error:
        raise StoreError(
            f"Cannot write {place}: {error.strerror}. Choose another output directory."
        ) from error


@contextmanager
def _written(place: Path) -> Iterator[None]:
    """A full disk or a lost folder inside is said of the place."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"Cannot write {place}: {error.strerror or error}.") from error


def locked(place: Path) -> int | None:
    """A descriptor that keeps other processes out of a directory while it is open.

    The system lets go of it however the process ends. None where there are no such locks.

    Raises:
        StoreError: another process holds it, or it cannot be opened.
    """
    if sys.platform == "win32":
        return None
    try:
        held = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"Cannot open {place}: {error.strerror}.") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise StoreError(
            f"{place} is in use: another run writes its outcomes there. Wait for it, or choose "
            "another directory."
        ) from error
    except OSError:
        os.close(held)
        return None
    return held


def claim(target: str | os.PathLike[str], identity: str, *, kind: str) -> Path:
    """A directory for files that are complete one by one, made or found with its identity.

    Raises:
        StoreError: it belongs to another run or is something else, or cannot be written.
    """
    place = Path(target).absolute()
    _check_target(place, identity, replace=False)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"Cannot write {place}: {error.strerror}. Choose another directory."
        ) from error
    if not (place / MANIFEST).exists():
        write_manifest(place, {"kind": kind, "identity": identity})
    return place


@contextmanager
def resume(
    target: str | os.PathLike[str], identity: str, *, replace: bool = False
) -> Iterator[Path]:
    """Like ``publish``, in a directory that a killed or failed run leaves for the next one.

    It stands beside the target and carries the identity in its name, so that no other run finds it.

    Raises:
        StoreError: the place belongs to something else, or cannot be written.
    """
    place = Path(target).absolute()
    _check_target(place, identity, replace=replace)
    part = place.with_name(f".{place.name}.{identity}.part")
    with _written(place):
        part.mkdir(parents=True, exist_ok=True)
        yield part
        _swap(part, place)


def _swap(part: Path, place: Path) -> None:
    """Move a finished directory into place; an earlier one goes only when the new one stands."""
    part.chmod(0o755)
    if not place.exists():
        part.rename(place)
        return
    old = part.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
    place.rename(old)
    try:
        part.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
