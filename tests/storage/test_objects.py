from __future__ import annotations

import errno
import os
import resource
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cola_runtime.errors import InvalidInput, NotFound, Unavailable
from cola_runtime.storage.objects import ObjectStorage


@pytest.fixture(params=["file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStorage:
    url = f"file://{tmp_path}/objects" if request.param == "file" else f"memory://{uuid.uuid4().hex}"
    return ObjectStorage(url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_was_put_is_got(storage: ObjectStorage) -> None:
    for content in (b"", b"\x00\xff" * 1000):
        storage.put("a/b/c.bin", content)
        assert storage.get("a/b/c.bin") == content
        assert storage.exists("a/b/c.bin")


def test_a_second_put_replaces(storage: ObjectStorage) -> None:
    storage.put("a", b"long first content")
    storage.put("a", b"second")
    assert storage.get("a") == b"second"
    assert storage.list() == ["a"]


def test_a_missing_object_is_not_found(storage: ObjectStorage) -> None:
    storage.put("a/b", b"x")
    for key in ("c", "a/c", "d/e/f"):
        assert not storage.exists(key)
        with pytest.raises(NotFound) as caught:
            storage.get(key)
        assert caught.value.reason == "OBJECT_UNKNOWN"


def test_delete_is_idempotent(storage: ObjectStorage) -> None:
    storage.put("a/b", b"x")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")
    assert storage.list() == []


def test_a_folder_is_no_object(storage: ObjectStorage) -> None:
    storage.put("a/b", b"x")
    assert not storage.exists("a")
    storage.delete("a")
    assert storage.get("a/b") == b"x"


def test_list_takes_a_prefix_of_the_key(storage: ObjectStorage) -> None:
    keys = ["jobs/1/a", "jobs/1/b", "jobs/10/a", "jobs2/a", "top"]
    for key in keys:
        storage.put(key, b"x")
    assert storage.list() == keys
    assert storage.list("jobs/1/") == keys[:2]
    assert storage.list("jobs/1") == keys[:3]
    assert storage.list("jobs") == keys[:4]
    assert storage.list("nothing/here/") == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a/..",
        "a//b",
        "a/",
        "a\\b",
        "..\\x",
        "a\x00b",
        "a b",
        "a\nb",
        "a\n",
        "%2e%2e/x",
        ".partial/x",
        "a/.hidden",
        "ключ",
        "a\u202eb",
        "x" * 513,
        "file:///etc/passwd",
    ],
)
def test_a_key_is_no_path(storage: ObjectStorage, key: str) -> None:
    for attempt in (storage.get, storage.exists, storage.delete, lambda k: storage.put(k, b"x")):
        with pytest.raises(InvalidInput) as caught:
            attempt(key)
        assert caught.value.reason == "OBJECT_KEY_INVALID"


def test_list_does_not_leave_the_root(storage: ObjectStorage) -> None:
    with pytest.raises(InvalidInput):
        storage.list("../")


def test_a_full_disk_leaves_the_old_object_and_no_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage(f"file://{folder}")
    storage.put("a/b", b"old")

    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(Unavailable) as caught:
        storage.put("a/b", b"new")
    assert caught.value.reason == "STORAGE_FULL"
    assert caught.value.retryable
    assert str(folder) not in str(caught.value)
    monkeypatch.undo()
    assert storage.get("a/b") == b"old"
    assert files_below(folder) == ["a/b"]


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Of this process: every number that the kernel gives it is taken."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    taken: list[int] = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_a_file_descriptor_nothing_is_stored_and_nothing_is_left(folder: Path) -> None:
    storage = ObjectStorage(f"file://{folder}")
    storage.put("a/b", b"old")
    with no_descriptor_left(), pytest.raises(Unavailable) as caught:
        storage.put("a/b", b"new")
    assert (caught.value.reason, "EMFILE" in caught.value.message) == ("STORAGE_FAILED", True)
    assert (storage.get("a/b"), files_below(folder)) == (b"old", ["a/b"])
    storage.put("a/b", b"new")
    assert storage.get("a/b") == b"new"


def test_another_disk_error_is_unavailable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage(f"file://{folder}")

    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Unavailable, match="EIO") as caught:
        storage.put("a/b", b"new")
    assert caught.value.reason == "STORAGE_FAILED"


def test_content_is_synced_before_it_is_visible_and_its_folder_after(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ObjectStorage(f"file://{folder}")
    storage.put("a/first", b"x")
    visible_at_sync = []
    real_sync = os.fsync

    def watched(descriptor: int) -> None:
        visible_at_sync.append((folder / "a/b").exists())
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    storage.put("a/b", b"new")
    assert visible_at_sync == [False, True]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told")
def test_an_objects_content_stays_in_no_page_cache_once_it_is_stored_or_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ObjectStorage(f"file://{folder}")
    told: list[str] = []

    def watched(_descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)  # all of it
        told.append("let go")

    real_sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (told.append("synced"), real_sync(descriptor)))
    monkeypatch.setattr(os, "posix_fadvise", watched)
    storage.put("a", b"new")
    assert told[:2] == ["synced", "let go"]  # before, nothing would go
    told.clear()
    assert storage.get("a") == b"new"
    assert told == ["let go"]


def test_what_a_killed_process_left_is_removed_and_never_listed(folder: Path) -> None:
    storage = ObjectStorage(f"file://{folder}")
    (folder / ".partial" / "rest").write_bytes(b"half")
    assert storage.list() == []
    ObjectStorage(f"file://{folder}")
    assert files_below(folder) == []


def test_readers_see_a_whole_object_while_it_is_replaced(storage: ObjectStorage) -> None:
    contents = [bytes([number]) * 200_000 for number in range(2)]
    storage.put("a", contents[0])
    seen = set()

    def write() -> None:
        for turn in range(40):
            storage.put("a", contents[turn % 2])

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        seen.add(storage.get("a"))
    writer.join(10)
    assert seen <= set(contents)
