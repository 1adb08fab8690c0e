"""Set-up and continuous integration: pinned, free of addresses, and failing when they should."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest


def pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in entries)
    return {canonical(name): version for name, version in (line.split("==") for line in entries)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_direct_dependency_is_pinned(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(r for group in project["optional-dependencies"].values() for r in group),
    ]
    names = {canonical(re.split(r"[\[<>=~! ]", requirement)[0]) for requirement in wanted}
    assert names - {"cola-runtime"} <= set(pins(repository))


def test_torch_is_pinned_without_a_local_build(repository: Path) -> None:
    assert pins(repository)["torch"] == "2.13.0"


@pytest.mark.parametrize(
    "name", ["constraints.txt", "requirements-data.txt", "pyproject.toml", "Makefile", ".ci/run"]
)
def test_files_of_the_setup_name_no_package_index(repository: Path, name: str) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    assert not re.search(r"https?://|file://|index-url|find-links|trusted-host", text)


def run_ci(repository: Path, folder: Path, *, failing: str) -> tuple[int, list[str]]:
    """`.ci/run` with a `make` that only notes its target, and fails for one of them."""
    make = folder / "make"
    make.write_text(f'#!/bin/sh\necho "$1 CI=$CI" >> {folder}/calls\n[ "$1" != "{failing}" ] || exit 5\n')
    make.chmod(0o755)
    path = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(["bash", repository / ".ci/run"], env=path, capture_output=True, timeout=30)
    return done.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("failing", "code"), [("none", 0), ("check", 1), ("test", 1)])
def test_ci_runs_checks_and_tests_and_fails_when_either_does(
    repository: Path, tmp_path: Path, failing: str, code: int
) -> None:
    assert run_ci(repository, tmp_path, failing=failing) == (code, ["check CI=true", "test CI=true"])


def test_ci_script_is_executable(repository: Path) -> None:
    assert (repository / ".ci/run").stat().st_mode & 0o111
