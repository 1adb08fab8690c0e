"""`cola keys ...`: API keys, through the service, or in its data folder while it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

if TYPE_CHECKING:
    from cola_runtime.jobs.store import JobStore

app = typer.Typer(
    no_args_is_help=True, help="Create, list and revoke API keys (needs a key with scope admin)."
)

Result = TypeVar("Result")
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="Work in this data folder, or COLA_DATABASE, instead; the service must be stopped."
    ),
]
ScopeOption = Annotated[
    list[str] | None,
    typer.Option("--scope", help="jobs:read, jobs:write or admin; repeatable. Default: both of jobs."),
]


WeightOption = Annotated[
    float | None, typer.Option("--weight", help="The tenant's weight in the fair shares; 1 by default.")
]
TokensOption = Annotated[
    int | None, typer.Option("--tokens-per-minute", help="Cap on the tenant's computed tokens; 0: none.")
]
ConcurrentOption = Annotated[
    int | None, typer.Option("--concurrent-jobs", help="Cap on its jobs that train at once; 0: none.")
]
StepsOption = Annotated[
    int | None, typer.Option("--total-steps", help="Cap on the steps of all its jobs, ever; 0: none.")
]


PinnedOption = Annotated[
    int | None, typer.Option("--pinned-bytes", help="Cap on the bytes of its pinned checkpoints; 0: none.")
]
ExpiryOption = Annotated[
    str, typer.Option("--expires-in", metavar="TIME", help="As 90s, 45m, 12h or 30d; never without it.")
]
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key; created if there is no such tenant.")],
    scope: ScopeOption = None,
    weight: WeightOption = None,
    tokens_per_minute: TokensOption = None,
    concurrent_jobs: ConcurrentOption = None,
    total_steps: StepsOption = None,
    pinned_bytes: PinnedOption = None,
    expires_in: ExpiryOption = "",
    data_dir: DataDirOption = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key. It is printed once and cannot be shown again.

    Weight and caps are the tenant's; what is not given stays as it is.
    """
    from cola_runtime.cli.output import clean, print_json, print_text

    terms = {
        "weight": weight,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_jobs": concurrent_jobs,
        "total_steps": total_steps,
        "pinned_bytes": pinned_bytes,
    }
    created = _create(tenant, scope or [], terms, _seconds(expires_in), data_dir=data_dir, url=url)
    if as_json:
        now = {name: getattr(getattr(created, "terms", created), name) for name in terms}
        print_json({"key": created.key, "tenant": created.tenant, "scopes": list(created.scopes), **now})
        return
    print_text(f"Key for {clean(created.tenant)} ({', '.join(map(clean, created.scopes))}), shown this once:")
    typer.echo(created.key)


@app.command("list")
def list_keys(data_dir: DataDirOption = None, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """Every key, without its secret."""
    from cola_runtime.cli.output import age, print_json, print_table

    found = [_public(key) for key in _list(data_dir, url)]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            key["key_id"],
            key["tenant"],
            ", ".join(key["scopes"]),
            age(key["created_at"]),
            age(key["last_used_at"]),
            age(key["revoked_at"]),
            key["expires_at"],
        )
        for key in found
    ]
    columns = ("KEY", "TENANT", "SCOPES", ">CREATED", ">LAST USED", ">REVOKED", "UNTIL")
    print_table(columns, rows, empty="No keys.")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="As `cola keys list` names it.")],
    data_dir: DataDirOption = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key open nothing from now on."""
    from cola_runtime.cli.output import clean, print_json, print_text

    revoked = _public(_revoke(key_id, data_dir, url))
    if as_json:
        print_json(revoked)
    else:
        print_text(("Revoked ", "green"), f"{clean(revoked['key_id'])} of {clean(revoked['tenant'])}")


def _seconds(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    if not text:
        return 0
    if not number.isascii() or not number.isdigit() or int(number) == 0 or unit not in SECONDS:
        raise typer.BadParameter(f"{text!r} is no time: give 90s, 45m, 12h or 30d", param_hint="--expires-in")
    return int(number) * SECONDS[unit]


def _create(
    tenant: str,
    scopes: list[str],
    terms: dict[str, Any],
    expires_in_seconds: int,
    *,
    data_dir: Path | None,
    url: str | None,
) -> Any:
    if data_dir is not None:
        from cola_runtime.jobs.audit import OPERATOR
        from cola_runtime.jobs.records import TermChanges
        from cola_runtime.server import keys

        changes = TermChanges(**terms)
        return _in_store(
            data_dir,
            lambda store: keys.create_key(
                store,
                tenant,
                scopes,
                changes=changes,
                expires_in_seconds=expires_in_seconds,
                audited_as=OPERATOR,
            ),
        )
    from cola_runtime.cli.connect import connected

    with connected(url) as client:
        return client.create_key(tenant, scopes=scopes, expires_in_seconds=expires_in_seconds, **terms)


def _list(data_dir: Path | None, url: str | None) -> Any:
    if data_dir is not None:
        return _in_store(data_dir, lambda store: store.keys())
    from cola_runtime.cli.connect import connected

    with connected(url) as client:
        return client.keys()


def _revoke(key_id: str, data_dir: Path | None, url: str | None) -> Any:
    if data_dir is not None:
        from cola_runtime.jobs.audit import OPERATOR
        from cola_runtime.server import keys

        return _in_store(data_dir, lambda store: keys.revoke_key(store, key_id, audited_as=OPERATOR))
    from cola_runtime.cli.connect import connected

    with connected(url) as client:
        return client.revoke_key(key_id)


def _public(key: Any) -> dict[str, Any]:
    """The same fields, whether the key came from the service or from the store."""
    return {
        "key_id": key.key_id,
        "tenant": getattr(key, "tenant", "") or key.tenant_name,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "last_used_at": key.last_used_at or "",
        "revoked_at": key.revoked_at or "",
        "expires_at": key.expires_at or "",
    }


def _in_store(data_dir: Path, work: Callable[[JobStore], Awaitable[Result]]) -> Result:
    from cola_runtime.config import service_settings
    from cola_runtime.errors import NotFound
    from cola_runtime.jobs.store import JobStore

    settings = service_settings(data_dir=data_dir)
    file = settings.store_file
    if settings.database is None and not file.exists():
        raise NotFound(
            "STORE_MISSING", "there is no job store", where=str(file), remedy="`cola serve` makes one."
        )

    async def go() -> Result:
        store = await JobStore.open(settings.store_url)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(go())
