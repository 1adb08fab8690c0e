"""Fixtures that every area may use."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cola_runtime.process_environment import offer_tls_1_3_only
from tests.postgres import TEMPLATE, PostgresServer, make_template, postgres_server, programs

offer_tls_1_3_only()  # as `cola serve` does, before any test imports grpc
# Ray forks what it starts out of this process, where gRPC's threads of earlier tests still run: its handlers
# at a fork can lock the child for good (grpc/grpc issues 22624, 31885), and nothing here needs them.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

Require = Callable[[str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", action="store_true", help="at least 100,000 frames and requests: `make fuzz`")
    parser.addoption("--matrix", action="store_true", help="all of the matrix, and its table: `make matrix`")
    parser.addoption(
        "--accelerator",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where base models are that a test loads without saying where: `make accelerator_tests`",
    )
    parser.addoption("--faults", action="store_true", help="every fault, and the table: `make faults`")
    parser.addoption("--many-jobs", action="store_true", help="10,000 jobs of a tenant: `make many-jobs`")
    parser.addoption("--traps", action="store_true", help="every trap put back, and the table: `make traps`")


@pytest.fixture(scope="session", autouse=True)
def chosen_accelerator(request: pytest.FixtureRequest) -> None:
    """With `--accelerator cuda` the base model's tests are tests of that."""
    if request.config.getoption("--accelerator") != "cpu":
        from cola_runtime.base_model.model import TappedModel

        options = TappedModel.load.__func__.__kwdefaults__
        options["accelerator"] = request.config.getoption("--accelerator")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def skip_or_fail() -> Require:
    """Call with a reason when something that a test needs is missing: skips here, fails in CI."""

    def unavailable(reason: str) -> None:
        if os.environ.get("CI"):
            pytest.fail(f"in CI nothing may be missing: {reason}", pytrace=False)
        pytest.skip(reason)

    return unavailable


@pytest.fixture(scope="session")
def require_package(skip_or_fail: Require) -> Require:
    """Call with the name of a package whose files a test reads (it is not imported)."""

    def require(package: str) -> None:
        if importlib.util.find_spec(package) is None:
            skip_or_fail(f"package {package!r} is not installed; run `make setup`")

    return require


@pytest.fixture(scope="session")
def postgres(skip_or_fail: Require) -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole run; a test that stops it starts it again."""
    folder = programs()
    if folder is None:
        skip_or_fail("PostgreSQL's server is not installed: `apt-get install postgresql`")
    assert folder is not None
    with postgres_server(folder) as server:
        asyncio.run(make_template(server))
        yield server


@contextmanager
def store_url(request: pytest.FixtureRequest, dialect: str, folder: Path, *, empty: bool) -> Iterator[str]:
    """Of a job store that nobody has written to; with `empty`, without tables."""
    if dialect == "sqlite":
        yield f"sqlite:///{folder}/jobs.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.new_database(template="template0" if empty else TEMPLATE)
    yield url
    server.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a job store: whoever asks for it is tried on both databases."""
    with store_url(request, request.param, tmp_path, empty=False) as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """As `url`, of a database without tables."""
    with store_url(request, request.param, tmp_path, empty=True) as made:
        yield made
