"""The KubeRay manifests: valid, closed against misspelling, agreeing with each other and the code."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from manifests import (
    DEPLOY,
    coordinator_container,
    kubernetes_manifests,
    manifest,
    ray_groups,
    shell_commands,
    validator,
)
from ray.scripts import scripts as ray_cli

from cola_runtime.config import DEFAULT_DEVICE_PORT, DEFAULT_GRPC_PORT, ServiceSettings, service_settings

# Mappings whose keys are the user's own: a schema cannot know them.
FREE_KEYS = {"matchLabels", "labels", "selector", "rayStartParams", "requests", "limits"}


def keys(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all fields that a schema must know."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        if isinstance(node, dict) and (
            not path or path[-1] not in FREE_KEYS or isinstance(child, dict | list)
        ):
            yield (*path, key)
        yield from keys(child, (*path, key))


def misspelt(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    node[f"{path[-1]}x"] = node.pop(path[-1])
    return changed


@pytest.mark.parametrize(
    "document", kubernetes_manifests(), ids=lambda m: f"{m['kind']}-{m['metadata']['name']}"
)
def test_manifest_passes_its_schema_and_every_misspelt_field_is_caught(document: dict[str, Any]) -> None:
    check = validator(document["kind"])
    check.validate(document)
    unnoticed = [path for path in keys(document) if check.is_valid(misspelt(document, path))]
    assert not unnoticed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "workerGroupSpecs", 0, "replicas"), "1"),
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (
            ("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "memory"),
            "4Gb",
        ),
        (("spec", "headGroupSpec", "template", "spec", "containers"), []),
    ],
)
def test_wrong_values_of_a_cluster_are_caught(path: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(manifest("RayCluster"))
    node: Any = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert not validator("RayCluster").is_valid(document)


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container["env"] if "value" in item}


def test_coordinator_runs_cola_serve_with_options_that_the_cli_knows() -> None:
    container = coordinator_container()
    assert container["command"] == ["/bin/sh", "-c"]
    join, serve = shell_commands(container["args"][0])
    assert join[:2] == ["ray", "start"]
    assert serve[:2] == ["cola", "serve"]
    program = Path(sys.executable).with_name("cola")
    shown = subprocess.run([program, "serve", "--help"], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(word.split("=")[0] in shown.stdout for word in serve[2:] if word.startswith("--"))


def test_coordinators_own_ray_node_starts_with_options_that_ray_knows() -> None:
    join, _ = shell_commands(coordinator_container()["args"][0])
    context = ray_cli.start.make_context("start", join[2:])
    assert context.params["address"] == "$RAY_ADDRESS"
    assert context.params["num_cpus"] == 0


def test_coordinators_environment_holds_only_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    values = environment(coordinator_container())
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = service_settings()
    for name in (name for name in values if name.startswith("COLA_")):
        node: Any = settings
        for part in name.removeprefix("COLA_").lower().split("__"):
            assert part.isdigit() or part in type(node).model_fields, f"{name} is no setting"
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        assert str(node) == values[name]
    assert settings.ray_address == f"{manifest('RayCluster')['metadata']['name']}-head-svc:6379"


def test_ports_are_the_services_default_everywhere() -> None:
    values, container = environment(coordinator_container()), coordinator_container()
    service = manifest("Service", "cola-coordinator")["spec"]["ports"]
    (exposed,) = re.findall(r"^EXPOSE ([\d ]+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    ports = [DEFAULT_GRPC_PORT, DEFAULT_DEVICE_PORT]
    default = ServiceSettings().listen.rpartition(":")[2]
    assert default == str(DEFAULT_GRPC_PORT)
    assert [port["containerPort"] for port in container["ports"]] == ports
    assert [port["port"] for port in service] == ports
    assert exposed.split() == list(map(str, ports))
    assert values["COLA_LISTEN"] == f"0.0.0.0:{default}"
    assert values["COLA_DEVICES__LISTEN"] == f"0.0.0.0:{DEFAULT_DEVICE_PORT}"
    assert values["COLA_DEVICES__ADVERTISE"] == f"cola-coordinator:{DEFAULT_DEVICE_PORT}"


def test_the_coordinator_shows_the_certificate_that_is_mounted() -> None:
    values = environment(coordinator_container())
    (mount,) = [each for each in coordinator_container()["volumeMounts"] if each["name"] == "tls"]
    assert values["COLA_TLS__CERTIFICATE"] == f"{mount['mountPath']}/tls.crt"  # names of a secret of type tls
    assert values["COLA_TLS__KEY"] == f"{mount['mountPath']}/tls.key"


def test_gradient_port_leads_to_the_base_models_pods() -> None:
    service = manifest("Service", "cola-base-model")["spec"]
    cluster = manifest("RayCluster")
    (group,) = [g for g in ray_groups() if g.get("groupName") == service["selector"]["ray.io/group"]]
    (container,) = group["template"]["spec"]["containers"]
    port = int(environment(coordinator_container())["COLA_BASE_MODELS__0__BIND"].rpartition(":")[2])
    assert service["selector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert [p["containerPort"] for p in container["ports"]] == [port]
    assert [p["port"] for p in service["ports"]] == [port]


def test_names_of_one_manifest_are_found_in_the_others() -> None:
    deployment = manifest("Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert manifest("Service", "cola-coordinator")["spec"]["selector"] == labels
    assert deployment["selector"]["matchLabels"] == labels
    volumes = {volume["name"]: volume for volume in deployment["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in coordinator_container()["volumeMounts"]} == set(volumes)
    claim = volumes["data"]["persistentVolumeClaim"]["claimName"]
    assert manifest("PersistentVolumeClaim")["metadata"]["name"] == claim
    secrets = {
        e["name"]: e["valueFrom"]["secretKeyRef"] for e in coordinator_container()["env"] if "valueFrom" in e
    }
    cluster = manifest("RayCluster")["metadata"]["name"]
    assert secrets == {
        "RAY_AUTH_TOKEN": {"name": cluster, "key": "auth_token"},
        "COLA_DATABASE": {"name": "cola-database", "key": "url", "optional": True},
    }


def test_join_token_lies_where_the_coordinator_reads_it(repository: Path) -> None:
    mounts = {mount["name"]: mount for mount in coordinator_container()["volumeMounts"]}
    values = environment(coordinator_container())
    assert mounts["data"]["mountPath"] == values["COLA_DATA_DIR"]
    assert mounts["join-token"]["mountPath"] == f"{values['COLA_DATA_DIR']}/{mounts['join-token']['subPath']}"
    source = (repository / "cola_runtime/runtime/coordinator.py").read_text(encoding="utf-8")
    assert f'data_dir / "{mounts["join-token"]["subPath"]}"' in source


def test_groups_offer_the_resources_that_the_runtime_asks_for(repository: Path) -> None:
    source = (repository / "cola_runtime/runtime/actors.py").read_text(encoding="utf-8")
    asked = set(re.findall(r'"resources": \{"(\w+)": 1\}', source))
    offered = {
        name: count * group["maxReplicas"]
        for group in ray_groups()
        if "resources" in group["rayStartParams"]
        # KubeRay puts the value on a shell line as it stands, so it carries its own quotes.
        for name, count in json.loads(json.loads(group["rayStartParams"]["resources"])).items()
    }
    assert set(offered) == asked == {"cola_base_model", "cola_device"}
    assert offered["cola_base_model"] == 1
    assert offered["cola_device"] >= int(environment(coordinator_container())["COLA_DEVICES__COUNT"])


def test_one_image_with_the_pinned_ray_serves_every_pod(repository: Path) -> None:
    pods = [*(group["template"] for group in ray_groups()), manifest("Deployment")["spec"]["template"]]
    images = {container["image"] for pod in pods for container in pod["spec"]["containers"]}
    version = re.search(r'^version = "(.+)"', (repository / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert images == {f"registry.example.com/cola-runtime:{version[1]}"}
    ray_version = manifest("RayCluster")["spec"]["rayVersion"]
    assert f"ray=={ray_version}" in (repository / "constraints.txt").read_text().splitlines()


def test_no_pod_runs_as_root_or_may_become_it() -> None:
    for pod in [*(group["template"] for group in ray_groups()), manifest("Deployment")["spec"]["template"]]:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
