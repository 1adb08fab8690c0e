"""Rules for the package's source that neither the linter nor import-linter can express."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "cola_runtime"
ENVIRONMENT_HOMES = (PACKAGE / "config.py", PACKAGE / "process_environment.py")
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "torch.load", "torch.hub.load", "numpy.load", "np.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load",
}  # fmt: skip


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "proto"]


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def environment_uses(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in {"os.environ", "os.getenv", "os.putenv"}:
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for alias in node.names if alias.name in {"environ", "getenv", "putenv"})


def unsafe_uses(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                yield str(node.module)
        elif isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS:
                yield dotted(node.func)
            yield from (
                f"{k.arg}=..." for k in node.keywords if k.arg == "trust_remote_code" and not is_false(k)
            )


def is_false(keyword: ast.keyword) -> bool:
    return isinstance(keyword.value, ast.Constant) and keyword.value.value is False


def test_the_environment_is_read_by_config_and_set_beside_it_and_nowhere_else() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sources()
        if path not in ENVIRONMENT_HOMES
        for line in environment_uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found
    for home in ENVIRONMENT_HOMES:
        assert list(environment_uses(ast.parse(home.read_text(encoding="utf-8"))))


def test_nothing_unpickles_evaluates_or_trusts_remote_code() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {use}"
        for path in sources()
        for use in unsafe_uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "eval(text)",
        "yaml.load(text, Loader=L)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=flag)",
    ],
)
def test_the_rules_find_what_they_forbid(code: str) -> None:
    assert list(unsafe_uses(ast.parse(code)))


@pytest.mark.parametrize("code", ["os.environ['A']", "os.getenv('A')", "from os import environ"])
def test_the_environment_rule_finds_every_spelling(code: str) -> None:
    assert list(environment_uses(ast.parse(code)))


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("cola_runtime", {"torch", "ray", "transformers", "sqlalchemy", "grpc", "pydantic"}),
        ("cola_runtime.client.sdk", {"torch", "ray", "transformers", "sqlalchemy"}),
        ("cola_runtime.server.service", {"torch", "ray"}),
        ("cola_runtime.scheduler.loop", {"torch", "ray"}),
        ("cola_runtime.jobs.store", {"torch", "ray", "transformers"}),
        ("cola_runtime.cli.main", {"torch", "ray", "transformers", "sqlalchemy", "matplotlib"}),
    ],
)
def test_import_stays_light(module: str, unwanted: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert not unwanted & set(done.stdout.split())


def contract_modules(name: str) -> set[str]:
    parser = configparser.ConfigParser()
    parser.read(PACKAGE.parent / ".importlinter")
    return set(parser[f"importlinter:contract:{name}"]["source_modules"].split())


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("ray", {"runtime"}),
        ("grpc", {"client", "server", "transport"}),
        ("sqlalchemy", {"jobs"}),
        ("cryptography", {"transport"}),
    ],
)
def test_every_module_is_under_the_contract_that_gives_a_library_one_home(
    library: str, homes: set[str]
) -> None:
    modules = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    expected = modules - homes - {"__init__", "proto"}
    assert contract_modules(library) == {f"cola_runtime.{module}" for module in expected}
