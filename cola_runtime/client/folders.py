"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cola_runtime.errors import Conflict, InvalidInput, ProtocolError

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class NewFolder:
    """Files being written beside their destination."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, file_name: str, content: bytes) -> None:
        """Add to the end of a file. The name comes from the network: only a plain name is taken."""
        if not _FILE_NAME.fullmatch(file_name):
            raise ProtocolError("FILE_NAME", f"the service sent {file_name!r}, which is not a file name")
        try:
            with (self.path / file_name).open("ab") as file:
                file.write(content)
        except OSError as error:
            raise _not_writable(self.path.parent, error) from error

    def sync(self) -> None:
        for path in (*self.path.iterdir(), self.path):
            _fsync(path)


@contextmanager
def new_folder(destination: Path, *, overwrite: bool = False) -> Iterator[NewFolder]:
    """A folder to fill, renamed to `destination` at the end; if the body raises, nothing remains.

    An existing `destination` raises Conflict `PATH_EXISTS`, unless it is empty or `overwrite` is set.
    """
    destination = destination.absolute()
    _check_free(destination, overwrite)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise _not_writable(destination, error) from error
    try:
        folder = NewFolder(staging)
        yield folder
        folder.sync()
        staging.chmod(0o755)
        _replace(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _not_writable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        "PATH_NOT_WRITABLE",
        f"cannot write there: {error.strerror}",
        where=str(path),
        remedy="Give another path. Nothing was written.",
    )


def _check_free(destination: Path, overwrite: bool) -> None:
    taken = destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))
    if taken and not (overwrite and destination.is_dir()):
        raise Conflict(
            "PATH_EXISTS",
            "the destination exists and is not an empty folder",
            where=str(destination),
            remedy="Choose another path, or overwrite it explicitly (`--overwrite`).",
        )


def _replace(staging: Path, destination: Path) -> None:
    """Put `staging` in the place of `destination`; a former folder is removed only after that."""
    if destination.exists() and any(destination.iterdir()):
        former = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        destination.rename(former)
        staging.rename(destination)
        shutil.rmtree(former)
    else:
        staging.rename(destination)
    _fsync(destination.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
