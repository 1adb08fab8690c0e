"""No dependency is older than the release that fixed what is known of it; what is not needed is not there."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

FLOORS = {
    "ray": (2, 59, 1),  # dashboard verbs behind the token
    "torch": (2, 11),  # CVE-2026-4538, -24747; CVE-2025-32434
    "protobuf": (6, 33, 5),  # CVE-2026-0994, CVE-2025-4565
    "aiohttp": (3, 14, 4),  # of Ray
    "certifi": (2026, 10, 18),  # the newest that the index has
    "cryptography": (46,),
    "jinja2": (3, 1, 6),  # sandbox escapes
    "pillow": (12,),
    "requests": (2, 32, 4),
    "urllib3": (2, 5),
    "transformers": (5,),
}
ABSENT = {"onnx", "python-jose", "dill", "joblib", "scikit-learn", "flask", "tensorflow"}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        name.lower(): version for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }


@pytest.mark.parametrize("name", FLOORS)
def test_it_is_pinned_and_installed_at_or_above_its_floor(name: str, repository: Path) -> None:
    assert numbers(pins(repository)[name]) >= FLOORS[name]
    assert numbers(importlib.metadata.version(name)) >= FLOORS[name]


def test_nothing_is_pinned_that_is_not_needed(repository: Path) -> None:
    assert not ABSENT & pins(repository).keys()


def test_a_version_below_its_floor_is_seen() -> None:
    assert numbers("2.10.0+cpu") < FLOORS["torch"] <= numbers("2.13.0+cpu")
