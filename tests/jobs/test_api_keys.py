from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from job_samples import HandClock

from cola_runtime.errors import Conflict, InvalidInput, NotFound
from cola_runtime.jobs import schema
from cola_runtime.jobs.records import Tenant
from cola_runtime.jobs.store import JobStore


async def test_a_key_opens_its_tenant_with_its_scopes(store: JobStore, tenant: Tenant) -> None:
    key = await store.create_key("acme", scopes=["jobs:read", "jobs:write"])
    assert key.startswith("tml-")
    assert await store.tenant_of_key(key) == tenant
    found = await store.authenticate(key)
    assert found is not None
    assert (found.tenant_id, found.scopes) == (tenant.tenant_id, {"jobs:read", "jobs:write"})


async def test_an_unknown_key_opens_nothing(store: JobStore, tenant: Tenant) -> None:
    key = await store.create_key("acme")
    assert await store.tenant_of_key(key[:-1]) is None
    assert await store.authenticate("") is None


async def test_a_revoked_key_opens_nothing(store: JobStore, tenant: Tenant) -> None:
    key = await store.create_key("acme")
    (listed,) = await store.keys()
    await store.revoke_key(listed.key_id)
    assert await store.authenticate(key) is None
    assert await store.tenant_of_key(key) is None


async def test_a_key_opens_nothing_from_its_end_on(
    store: JobStore, tenant: Tenant, hand_clock: HandClock
) -> None:
    forever = await store.create_key("acme")
    key = await store.create_key("acme", expires_in=timedelta(hours=1))
    hand_clock.forward(seconds=3599)
    assert await store.tenant_of_key(key) == tenant
    hand_clock.forward(seconds=1)
    assert await store.authenticate(key) is None
    assert await store.tenant_of_key(key) is None
    assert await store.tenant_of_key(forever) == tenant
    assert {each.expires_at for each in await store.keys()} == {None, "2026-01-02T04:04:05.000000Z"}


async def test_revoking_twice_keeps_the_first_date(
    store: JobStore, tenant: Tenant, hand_clock: HandClock
) -> None:
    await store.create_key("acme")
    (listed,) = await store.keys()
    await store.revoke_key(listed.key_id)
    (first,) = await store.keys()
    hand_clock.forward(seconds=10)
    await store.revoke_key(listed.key_id)
    assert await store.keys() == [first]
    assert first.revoked_at == "2026-01-02T03:04:05.000000Z"


async def test_last_use_is_noted_at_most_once_a_minute(
    store: JobStore, tenant: Tenant, hand_clock: HandClock
) -> None:
    key = await store.create_key("acme")
    seen = []
    for seconds in (0, 59, 1):
        hand_clock.forward(seconds=seconds)
        await store.authenticate(key)
        seen.append((await store.keys())[0].last_used_at)
    assert seen == ["2026-01-02T03:04:05.000000Z"] * 2 + ["2026-01-02T03:05:05.000000Z"]


def stored_bytes(url: str, folder: Path) -> bytes:
    """All that the database keeps: its files, or of a server's every row of every table."""
    if url.startswith("sqlite"):
        return b"".join(path.read_bytes() for path in folder.iterdir())
    with psycopg.connect(url) as session:
        rows = [session.execute(f"SELECT * FROM {name}").fetchall() for name in schema.metadata.tables]
    return repr(rows).encode()


async def test_the_key_itself_is_not_in_the_database(
    store: JobStore, tenant: Tenant, url: str, tmp_path: Path
) -> None:
    key = await store.create_key("acme")
    await store.close()
    stored = stored_bytes(url, tmp_path)
    assert b"acme" in stored
    assert key.encode() not in stored
    assert key.removeprefix("tml-").encode() not in stored


async def test_tenant_names_are_unique_and_printable(store: JobStore, tenant: Tenant) -> None:
    with pytest.raises(Conflict) as caught:
        await store.create_tenant("acme")
    assert caught.value.reason == "TENANT_EXISTS"
    for name in ("", "x" * 64, "a\x1b[31m"):
        with pytest.raises(InvalidInput):
            await store.create_tenant(name)
    assert await store.tenants() == [tenant]


async def test_a_key_needs_a_known_tenant_and_whole_scopes(store: JobStore, tenant: Tenant) -> None:
    with pytest.raises(NotFound):
        await store.create_key("nobody")
    with pytest.raises(InvalidInput):
        await store.create_key("acme", scopes=[])
    with pytest.raises(InvalidInput):
        await store.create_key("acme", scopes=["jobs:read admin"])
    with pytest.raises(NotFound):
        await store.revoke_key("key-0")
