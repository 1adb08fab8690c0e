from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from serving import Served
from serving_fixtures import client, job_file, served, spec, tokenizer_path

from cola_runtime.cli.main import main

__all__ = ["client", "cola", "job_file", "served", "spec", "tokenizer_path"]


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cola(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ran]:
    """Runs `cola ...` in this process, with alice's key, against the real service."""
    monkeypatch.setenv("COLA_BASE_URL", served.url)
    monkeypatch.setenv("COLA_API_KEY", served.keys["alice"])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("cola_runtime.client.connection.RETRY_DELAYS_SECONDS", (0.01,))

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        code = ended.value.code
        captured = capsys.readouterr()
        return Ran(code=code if isinstance(code, int) else 0, out=captured.out, err=captured.err)

    return run
