"""A process dies exactly where it is told to, once; without being told, never."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cola_runtime import crash_points
from cola_runtime.config import crash_setting
from cola_runtime.errors import InvalidInput

PACKAGE = Path(crash_points.__file__).parent
PROGRAM = (
    "from cola_runtime import crash_points; from cola_runtime.config import crash_setting;"
    "crash_points.arm(crash_setting());"
    "[(print(n, flush=True), crash_points.reach('storage.written')) for n in (1, 2, 3)]"
)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    crash_points.arm(None)


def run(setting: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setenv("COLA_CRASH_AT", setting)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    return done.returncode, "".join(done.stdout.split())


def test_the_nth_time_at_the_point_is_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marker = tmp_path / "died"
    assert run(f"storage.written:2:{marker}", monkeypatch) == (-signal.SIGKILL, "12")
    assert marker.exists()
    assert run(f"storage.written:2:{marker}", monkeypatch) == (0, "123"), "only one process dies of a marker"


def test_nothing_dies_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLA_CRASH_AT", raising=False)
    assert crash_setting() is None
    crash_points.arm(crash_setting())
    for point in crash_points.POINTS:
        crash_points.reach(point)


@pytest.mark.parametrize("wrong", ["nowhere", "storage.written:0", "storage.written:x", "storage.written:-1"])
def test_a_wrong_setting_is_refused_with_the_points_there_are(wrong: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        crash_points.arm(wrong)
    assert caught.value.reason == "CRASH_POINT_INVALID"
    assert "storage.renamed" in str(caught.value.limit)


def test_every_point_is_at_one_place_in_the_source() -> None:
    found = [
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r'crash_points\.reach\(f?"([^"]+)"\)', path.read_text(encoding="utf-8"))
    ]
    writes = [
        name
        for path in (PACKAGE / "jobs").glob("*.py")
        for name in re.findall(r'_writes\.run\(\s*"(\w+)"', path.read_text(encoding="utf-8"))
    ]
    moments = [name for name in found if "{what}" in name]
    expected = {name.replace("{what}", write) for name in moments for write in writes}
    expected |= set(found) - set(moments)
    assert expected == crash_points.POINTS
    assert len(found) == len(set(found))
