"""A demo that cannot end as it should says so: jobs that take too long, a check that fails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cola_runtime.demo import run
from cola_runtime.errors import JobFailed


class Endless:
    """A client whose one job trains for ever."""

    async def submit(self, *_: Any, **__: Any) -> Endless:
        return self

    async def describe(self) -> Any:
        return SimpleNamespace(base_busy_seconds=0.0, base_steps=0)

    async def refresh(self) -> Any:
        return SimpleNamespace(ended=False)


async def test_jobs_that_do_not_end_in_time_end_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "JOB_TIMEOUT_SECONDS", -1.0)
    monkeypatch.setattr(run, "live_table", lambda *_, **__: "")
    data = SimpleNamespace(training=b"", held_out=b"")
    tenant: Any = SimpleNamespace(name="film", spec=None, data=data)
    entry = run._Tenant(tenant=tenant, client=Endless())  # type: ignore[arg-type]
    with pytest.raises(JobFailed) as caught:
        await run._train([entry], Console(quiet=True), kill_device=False)
    assert caught.value.reason == "DEMO_TIMEOUT"


async def test_a_check_that_fails_ends_the_demo_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checker = tmp_path / "python"
    checker.write_text("#!/bin/sh\necho no such folder >&2\nexit 1\n")
    checker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(checker))
    with pytest.raises(JobFailed, match="no such folder") as caught:
        await run._check([], tmp_path, tmp_path)
    assert caught.value.reason == "DEMO_CHECK_FAILED"
