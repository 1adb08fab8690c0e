"""Who is calling, and what the key allows. Every rpc has a rule here, or the service does not start."""

from __future__ import annotations

from collections.abc import Iterable

from cola_runtime.errors import PermissionDenied, Unauthenticated
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.store import ALL_SCOPES, JobStore

READ = "jobs:read"
WRITE = "jobs:write"
ADMIN = "admin"
TENANT_SCOPES = (READ, WRITE)

SCOPE_OF_RPC = {
    "SubmitJob": WRITE,
    "CheckDataset": WRITE,
    "EstimateJob": WRITE,
    "GetJob": READ,
    "ListJobs": READ,
    "CancelJob": WRITE,
    "PauseJob": WRITE,
    "ResumeJob": WRITE,
    "WatchEvents": READ,
    "ListSteps": READ,
    "ListEvaluations": READ,
    "ListCheckpoints": READ,
    "ExportAdapter": READ,
    "Generate": WRITE,
    "DescribeService": READ,
    "CreateKey": ADMIN,
    "ListKeys": ADMIN,
    "RevokeKey": ADMIN,
    "GetUsage": READ,
    "ListUsage": ADMIN,
    "StartTrace": ADMIN,
    "StopTrace": ADMIN,
}

_MAX_KEY_CHARACTERS = 512
_REMEDY = "Set COLA_API_KEY; `cola serve` prints a first key once, `cola keys create` makes others."


async def authenticate(store: JobStore, metadata: Iterable[tuple[str, str | bytes]], *, scope: str) -> Tenant:
    """The tenant whose key the metadata carries.

    Raises Unauthenticated `KEY_MISSING` or `KEY_UNKNOWN` (also: revoked), PermissionDenied `SCOPE_MISSING`.
    """
    key = await store.authenticate(_bearer_key(metadata))
    if key is None:
        raise Unauthenticated("KEY_UNKNOWN", "the API key is unknown or was revoked", remedy=_REMEDY)
    if scope not in key.scopes and ALL_SCOPES not in key.scopes:
        raise PermissionDenied(
            "SCOPE_MISSING",
            f"the API key lacks the scope {scope}",
            actual=", ".join(sorted(key.scopes)),
            remedy="Use a key that has it; `cola keys create --scope` makes one.",
        )
    return Tenant(tenant_id=key.tenant_id, name=key.tenant_name, created_at=key.created_at)


def _bearer_key(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for name, value in metadata if name.lower() == "authorization"]
    if len(values) == 1 and isinstance(values[0], str):
        kind, _, key = values[0].partition(" ")
        if kind.lower() == "bearer" and 0 < len(key.strip()) <= _MAX_KEY_CHARACTERS:
            return key.strip()
    raise Unauthenticated("KEY_MISSING", "the call carries no API key", remedy=_REMEDY)
