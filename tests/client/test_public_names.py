"""What users import, and what importing it costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import cola_runtime
from cola_runtime.client import sdk

HEAVY = ("torch", "ray", "transformers", "sqlalchemy", "alembic")


def test_the_public_names_are_exactly_those_intended() -> None:
    assert sorted(cola_runtime.__all__) == [
        "AsyncClient",
        "Client",
        "EvaluationSpec",
        "JobHandle",
        "JobSpec",
        "LoraSpec",
        "OptimizerSpec",
        "ScheduleSpec",
    ]
    assert sorted(sdk.__all__) == [
        "AsyncClient",
        "AsyncJobHandle",
        "AuditEntry",
        "BaseModel",
        "Checkpoint",
        "Client",
        "DatasetReport",
        "Device",
        "Evaluation",
        "Event",
        "Generation",
        "Job",
        "JobEstimate",
        "JobHandle",
        "JobSpec",
        "JoinToken",
        "Key",
        "NewKey",
        "RegisteredDevice",
        "Replica",
        "Service",
        "Step",
        "Usage",
    ]
    assert all(hasattr(cola_runtime, name) for name in cola_runtime.__all__)
    assert all(hasattr(sdk, name) for name in sdk.__all__)


def test_the_methods_are_exactly_those_intended() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert methods(sdk.Client) == {
        "audit",
        "check_dataset",
        "close",
        "create_join_token",
        "create_key",
        "describe",
        "estimate",
        "generate",
        "job",
        "jobs",
        "keys",
        "registered_devices",
        "reinstate_device",
        "revoke_device",
        "revoke_key",
        "start_trace",
        "stop_trace",
        "submit",
        "usage",
        "usage_of_all",
    }
    assert methods(sdk.JobHandle) == {
        "cancel",
        "checkpoints",
        "download_adapter",
        "evaluations",
        "events",
        "generate",
        "job",
        "job_id",
        "metrics",
        "name",
        "pause",
        "pin",
        "refresh",
        "resume",
        "unpin",
        "wait",
    }


def test_synchronous_methods_carry_signature_and_docstring() -> None:
    assert sdk.JobHandle.wait.__doc__ == sdk.AsyncJobHandle.wait.__doc__
    assert sdk.Client.submit.__doc__ == sdk.AsyncClient.submit.__doc__


@pytest.mark.parametrize("module", ["cola_runtime", "cola_runtime.client.sdk", "cola_runtime.cli.main"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == []
