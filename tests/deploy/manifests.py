"""Reads what lies under deploy/."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = ("kuberay-cluster.yaml", "kuberay-coordinator.yaml")
RAY_UP = ("ray-cluster.yaml", "ray-cluster-aws.yaml")

Manifest = dict[str, Any]


def documents(name: str) -> list[Manifest]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def kubernetes_manifests() -> list[Manifest]:
    return [document for name in KUBERNETES for document in documents(name)]


def manifest(kind: str, name: str | None = None) -> Manifest:
    """The only manifest of that kind (and name)."""
    found = [m for m in kubernetes_manifests() if m["kind"] == kind and name in (None, m["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} manifests of kind {kind}"
    return found[0]


def coordinator_container() -> Manifest:
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(container)


def ray_groups() -> list[Manifest]:
    spec = manifest("RayCluster")["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def validator(kind: str) -> Draft202012Validator:
    schemas = {
        path.name: json.loads(path.read_text(encoding="utf-8")) for path in DEPLOY.glob("schema/*.json")
    }
    registry = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in schemas.values()
    )
    return Draft202012Validator(schemas[f"{kind.lower()}-v1.schema.json"], registry=registry)


def shell_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of an `a && b` line, without assignments, `exec` and `cd`."""
    for part in line.split("&&"):
        words = shlex.split(part)
        while words and ("=" in words[0] or words[0] == "exec"):
            words = words[1:]
        if words and words[0] != "cd":
            yield words
