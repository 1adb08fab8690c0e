"""Objects by key, over fsspec: a folder (`file:///path`), memory (`memory://name`) or a bucket.

An object is there whole or not at all. Methods block; callers in an event loop use `asyncio.to_thread`, which
is safe: instances keep no state between calls.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cola_runtime import crash_points
from cola_runtime.errors import ColaError, InvalidInput, NotFound, Unavailable

MAX_KEY_CHARACTERS = 512

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_PARTIAL = ".partial"  # no key can begin so; holds what is being written
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ObjectStorage:
    """Puts, gets and lists byte strings under server-made keys such as `checkpoints/job-1/10-2`."""

    def __init__(self, url: str) -> None:
        """Removes what a killed process left half-written. Raises Unavailable if a folder fails."""
        self._files, self._root = url_to_fs(url)
        if self._local:
            with _as_ours(url):
                _clear(Path(self._root, _PARTIAL))

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Store durably, replacing an older object in one move. Raises Unavailable `STORAGE_FULL`."""
        path = self._path(key)
        with _as_ours(key):
            if self._local:
                self._put_file(Path(path), content)
            else:
                # Object stores show an object only when it is whole.
                self._files.pipe_file(path, bytes(content))

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises NotFound `OBJECT_UNKNOWN`."""
        path = self._path(key)
        with _as_ours(key):
            if self._local:
                return _read_once(Path(path))
            content: bytes = self._files.cat_file(path)
        return content

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with _as_ours(key):
            return bool(self._files.isfile(path))

    def delete(self, key: str) -> None:
        """The object is gone afterwards, also if it never was."""
        path = self._path(key)
        with _as_ours(key):
            if self._files.isfile(path):
                self._files.rm_file(path)

    def list(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""
        folder = prefix.rpartition("/")[0]
        path = self._path(folder) if folder else self._root
        with _as_ours(prefix):
            found = self._files.find(path) if self._files.isdir(path) else []
        keys = (str(each).removeprefix(self._root).lstrip("/") for each in found)
        return sorted(key for key in keys if key.startswith(prefix) and _KEY.fullmatch(key))

    @property
    def _local(self) -> bool:
        return isinstance(self._files, LocalFileSystem)

    def _path(self, key: str) -> str:
        if len(key) > MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
            raise InvalidInput(
                "OBJECT_KEY_INVALID",
                f"{key[:80]!r} is no storage key",
                limit=f"{MAX_KEY_CHARACTERS} characters",
            )
        return f"{self._root.rstrip('/')}/{key}"

    def _put_file(self, path: Path, content: bytes | memoryview) -> None:
        partial = Path(self._root, _PARTIAL, uuid.uuid4().hex)
        try:
            _write_synced(partial, content)
            _make_folder(path.parent)
            crash_points.reach("storage.written")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(path.parent)
        crash_points.reach("storage.renamed")


def _write_synced(path: Path, content: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        _let_go_of_pages(file.fileno())


def _read_once(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read()
        _let_go_of_pages(file.fileno())
    return content


def _let_go_of_pages(descriptor: int) -> None:
    """Tell the system that it need not keep the file's content in memory.

    Objects are read rarely, if ever. A job's checkpoints would otherwise take new memory each, to which a
    virtual machine comes the hard way: 70 ms of CPU for 30 MB instead of 6 (docs/performance.md).
    """
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _make_folder(path: Path) -> None:
    """Make the folder and those above it, each durable before the next."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """A rename survives a power cut only once its folder is on disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    _make_folder(folder)
    for leftover in folder.iterdir():
        leftover.unlink()


@contextmanager
def _as_ours(key: str) -> Iterator[None]:
    """The only place where a storage error becomes one of ours; paths stay out of the message."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound("OBJECT_UNKNOWN", f"there is no object {key!r}") from error
    except OSError as error:
        raise _unavailable(error) from error


def _unavailable(error: OSError) -> ColaError:
    details: dict[str, Any] = {"remedy": "Free space or raise the quota, then try again."}
    if error.errno in _NO_SPACE:
        return Unavailable("STORAGE_FULL", "the object storage has no space; nothing was changed", **details)
    cause = errno.errorcode.get(error.errno or 0, type(error).__name__)
    return Unavailable(
        "STORAGE_FAILED", f"the object storage failed ({cause})", remedy="See the service's log."
    )
