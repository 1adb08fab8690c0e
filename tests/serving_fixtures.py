"""Fixtures over `serving.py`, imported by the conftest of each area that talks to a service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import BASE_MODEL, ROWS, Served, serving

from cola_runtime.client.sdk import Client
from cola_runtime.spec import JobSpec


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cola_runtime.testing.tiny_models import byte_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def served(tmp_path: Path, tokenizer_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "service", tokenizer_path) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    """Of the tenant alice."""
    with Client(base_url=served.url, api_key=served.keys["alice"]) as connected:
        yield connected


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec(name="greeter", base_model=BASE_MODEL, rows_per_step=4)


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A good job.yaml with its data beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(ROWS)
    file = folder / "job.yaml"
    file.write_text(f"name: greeter\nbase_model: {BASE_MODEL}\nrows_per_step: 4\ntraining: train.jsonl\n")
    return file
