"""`cola audit ...`: who did what."""

from __future__ import annotations

from typing import Annotated

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

app = typer.Typer(no_args_is_help=True, help="Who did what (needs a key with scope admin).")


@app.command("list")
def list_audit(
    after: Annotated[int, typer.Option(min=0, help="Entries above this id; 0: the newest ones.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Keys, devices and jobs: made, revoked, refused; oldest first."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import clean, print_json, print_table

    with connected(url) as client:
        found = client.audit(after=after, limit=limit)
    if as_json:
        print_json(found)
        return
    rows = [
        (
            str(entry.id),
            entry.created_at,
            entry.kind,
            clean(entry.actor),
            clean(entry.tenant),
            clean(entry.subject),
            clean(entry.message),
        )
        for entry in found
    ]
    print_table((">ID", "AT", "WHAT", "WHO", "TENANT", "TO", ""), rows, empty="Nothing yet.")
