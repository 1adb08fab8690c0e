"""Who is calling, and whether the key has the scope that the verb's rule asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cola_runtime.errors import Conflict, PermissionDenied, Unauthenticated
from cola_runtime.jobs.recall import Recall
from cola_runtime.jobs.records import ApiKey
from cola_runtime.jobs.store import ALL_SCOPES, JobStore
from cola_runtime.transport.status import SDK_METADATA

OLDEST_SDK = (0, 1)
_MAX_KEY_CHARACTERS = 512
_REMEDY = "Set COLA_API_KEY; `cola serve` prints a first key once, `cola keys create` makes others."


async def authenticate(
    keys: JobStore | Recall, metadata: Iterable[tuple[str, str | bytes]], *, scope: str
) -> ApiKey:
    """The key that the metadata carries, which says whose it is.

    Raises Unauthenticated `KEY_MISSING` or `KEY_UNKNOWN` (also: revoked, expired), PermissionDenied
    `SCOPE_MISSING`.
    """
    key = await keys.authenticate(_bearer_key(metadata))
    if key is None:
        raise Unauthenticated(
            "KEY_UNKNOWN", "the API key is unknown, was revoked or has expired", remedy=_REMEDY
        )
    if scope not in key.scopes and ALL_SCOPES not in key.scopes:
        raise PermissionDenied(
            "SCOPE_MISSING",
            f"the API key lacks the scope {scope}",
            actual=", ".join(sorted(key.scopes)),
            remedy="Use a key that has it; `cola keys create --scope` makes one.",
        )
    return key


def check_sdk(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Raises Conflict `SDK_TOO_OLD` for this package's client of a release that the service does not serve.

    Clients of other making do not say what they are, and are taken as they come.
    """
    stated = next((value for name, value in metadata if name.lower() == SDK_METADATA), None)
    if stated is None:
        return
    version = tuple(map(int, re.findall(r"[0-9]{1,6}", str(stated)[:60])))
    if version < OLDEST_SDK:
        oldest = ".".join(map(str, OLDEST_SDK))
        raise Conflict(
            "SDK_TOO_OLD",
            "the client is of a release that this service does not serve any more",
            limit=f"{oldest} or newer",
            actual=str(stated)[:60],
            remedy=f"Upgrade it: pip install --upgrade 'cola_runtime>={oldest}'.",
        )


def _bearer_key(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for name, value in metadata if name.lower() == "authorization"]
    if len(values) == 1 and isinstance(values[0], str):
        kind, _, key = values[0].partition(" ")
        if kind.lower() == "bearer" and 0 < len(key.strip()) <= _MAX_KEY_CHARACTERS:
            return key.strip()
    raise Unauthenticated("KEY_MISSING", "the call carries no API key", remedy=_REMEDY)
