"""Files of real data: from the folder UPWEIGHT_DATA names, else fetched once and checked.

Checksums are of the unpacked content, because re-packed archives differ in their wrapper.
"""

import gzip
import hashlib
import io
import os
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from upweight.errors import DataError
from upweight.tables import atomic_write

__all__ = [
    "content",
    "folder",
    "joined",
    "members",
    "unpacked_gzip",
    "unpacked_tar",
    "unpacked_zip",
]

Unpack = Callable[[bytes], bytes]


def folder(name: str) -> Path:
    """Where the files of one data set are: ``$UPWEIGHT_DATA/name``, else the user's cache."""
    given = os.environ.get("UPWEIGHT_DATA")
    if given:
        return Path(given) / name
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upweight" / name


def unpacked_gzip(packed: bytes) -> bytes:
    """The content of a .gz file."""
    return gzip.decompress(packed)


def joined(parts: Mapping[str, bytes]) -> bytes:
    """Names and contents in the order of the names: the same for every archive of the same files."""
    return b"".join(
        f"{name}\0{len(parts[name])}\0".encode() + parts[name] for name in sorted(parts)
    )


def members(joined: bytes) -> dict[str, bytes]:
    """Files by name, from what ``unpacked_zip`` or ``unpacked_tar`` made of an archive."""
    found, at = {}, 0
    while at < len(joined):
        name, size, _ = joined[at : at + 1000].split(b"\0", 2)
        start = at + len(name) + len(size) + 2
        at = start + int(size)
        found[name.decode()] = joined[start:at]
    return found


def unpacked_zip(packed: bytes) -> bytes:
    """All files of a .zip archive; ``members`` takes them apart."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return joined({i.filename: archive.read(i) for i in archive.infolist() if not i.is_dir()})


def unpacked_tar(packed: bytes) -> bytes:
    """All files of a .tar.gz archive; ``members`` takes them apart."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        files = [item for item in archive.getmembers() if item.isfile()]
        return joined({item.name: archive.extractfile(item).read() for item in files})


def _verified(packed: bytes, name: str, expected: str, unpack: Unpack) -> bytes:
    """The unpacked content, if it is the content that was meant."""
    try:
        unpacked = unpack(packed)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(
            f"{name} is truncated or no archive ({error}): its own sha256 is "
            f"{hashlib.sha256(packed).hexdigest()}, and its content should have {expected}. "
            "Delete it and fetch it again."
        ) from error
    found = hashlib.sha256(unpacked).hexdigest()
    if found != expected:
        raise DataError(
            f"{name} has the wrong content: sha256 {found}, expected {expected}. Delete it and "
            "fetch it again."
        )
    return unpacked


def content(path: Path, source: str, expected: str, unpack: Unpack = unpacked_gzip) -> bytes:
    """The unpacked content of a file, fetched from its source where it is missing.

    Args:
        path: where the file is, or will be.
        source: its public address.
        expected: sha256 of the unpacked content.
        unpack: from the file's bytes to its content.

    Raises:
        DataError: truncated, or another content; the message has the name and both checksums.
    """
    if path.exists():
        return _verified(path.read_bytes(), str(path), expected, unpack)
    try:
        with urllib.request.urlopen(source, timeout=60) as reply:
            packed = reply.read()
    except OSError as error:
        raise DataError(
            f"{path} is missing and {source} could not be fetched ({error}). Fetch it by hand, or "
            "set UPWEIGHT_DATA to a folder that holds it."
        ) from error
    unpacked = _verified(packed, source, expected, unpack)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, packed)
    return unpacked
