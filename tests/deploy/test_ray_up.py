"""The `ray up` cluster files and the image: accepted by Ray's own validator, with commands that exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError
from manifests import DEPLOY, RAY_UP, documents, shell_commands
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts as ray_cli


def cluster_file(name: str) -> dict[str, Any]:
    (document,) = documents(name)
    return document


@pytest.mark.parametrize("name", RAY_UP)
def test_rays_own_validator_accepts_the_file(name: str) -> None:
    config = prepare_config(cluster_file(name))
    validate_config(config)
    assert config["max_workers"] >= 2


@pytest.mark.parametrize("name", RAY_UP)
def test_rays_own_validator_refuses_a_misspelt_field(name: str) -> None:
    config = cluster_file(name)
    config["setup_comands"] = config.pop("setup_commands")
    with pytest.raises(ValidationError, match="setup_comands"):
        validate_config(prepare_config(config))


def ray_starts(name: str) -> list[dict[str, Any]]:
    config = cluster_file(name)
    lines = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    commands = [words for line in lines for words in shell_commands(line) if words[1] == "start"]
    assert all(words[0].endswith("/ray") for words in commands)
    return [ray_cli.start.make_context("start", words[2:]).params for words in commands]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_starts_with_options_that_it_knows_and_without_a_public_dashboard(name: str) -> None:
    head, worker = ray_starts(name)
    assert head["head"] is True
    assert head["dashboard_host"] == "127.0.0.1"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"


@pytest.mark.parametrize("name", RAY_UP)
def test_machines_offer_what_the_runtime_asks_for(name: str) -> None:
    types = cluster_file(name).get("available_node_types", {})
    offers = [node["resources"] for node in types.values()]
    offers += [json.loads(params["resources"]) for params in ray_starts(name) if params["resources"] != "{}"]
    named = {resource: count for offer in offers for resource, count in offer.items()}
    assert named["cola_base_model"] == 1
    assert named["cola_device"] >= 1


@pytest.mark.parametrize("name", RAY_UP)
def test_every_start_of_ray_demands_the_token(name: str) -> None:
    config = cluster_file(name)
    starts = [
        line
        for line in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "~/.ray/auth_token" in config["file_mounts"]


def inline_python() -> list[str]:
    files = [DEPLOY / name for name in ("Dockerfile", *RAY_UP)]
    return [
        code for path in files for code in re.findall(r'python -c "(.+?)"', path.read_text(encoding="utf-8"))
    ]


def test_inline_python_names_what_exists() -> None:
    programs = inline_python()
    assert len(programs) == 3
    for program in programs:
        for node in ast.parse(program).body:
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_image_copies_only_files_of_the_repository(repository: Path) -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    sources = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert "constraints.txt" in sources
    assert [source for source in sources if not (repository / source).exists()] == []
