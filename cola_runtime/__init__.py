"""A distributed runtime for ColA: one frozen base model, many tenants, adapters trained on devices."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CLIENT_NAMES = {"AsyncClient", "Client", "JobHandle"}
_SPEC_NAMES = {"EvaluationSpec", "JobSpec", "LoraSpec", "OptimizerSpec", "ScheduleSpec"}

if TYPE_CHECKING:
    from cola_runtime.client.sdk import AsyncClient, Client, JobHandle
    from cola_runtime.spec import EvaluationSpec, JobSpec, LoraSpec, OptimizerSpec, ScheduleSpec

__all__ = [
    "AsyncClient",
    "Client",
    "EvaluationSpec",
    "JobHandle",
    "JobSpec",
    "LoraSpec",
    "OptimizerSpec",
    "ScheduleSpec",
]


def __getattr__(name: str) -> Any:
    """Load public names on first use, so that `import cola_runtime` stays light."""
    if name in _CLIENT_NAMES:
        from cola_runtime.client import sdk

        return getattr(sdk, name)
    if name in _SPEC_NAMES:
        from cola_runtime import spec

        return getattr(spec, name)
    raise AttributeError(f"module 'cola_runtime' has no attribute {name!r}")
