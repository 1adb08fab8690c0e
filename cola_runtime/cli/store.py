"""`cola store ...`: the job store of a service that is stopped."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from cola_runtime.cli.options import JsonFlag

if TYPE_CHECKING:
    from cola_runtime.jobs.store_copy import StorePlace

app = typer.Typer(no_args_is_help=True, help="The job store of a stopped service.")

PLACE_HELP = "A data folder (its SQLite file), or postgresql://... (PGPASSWORD may hold the password)."


@app.command("copy")
def copy_store(
    source: Annotated[str, typer.Argument(metavar="FROM", help=PLACE_HELP)],
    target: Annotated[str, typer.Argument(metavar="TO", help="Likewise; it must be empty.")],
    as_json: JsonFlag = False,
) -> None:
    """Copy jobs, keys, devices and all else to another database, whole or not at all."""
    from cola_runtime.cli.output import clean, print_json, print_table, print_text
    from cola_runtime.jobs.store_copy import StorePlace, copy_store

    places = StorePlace.of(source), StorePlace.of(target)
    copied = asyncio.run(copy_store(*places))
    if as_json:
        print_json(copied)
        return
    rows = [(each.table, str(each.rows), each.sha256[:16]) for each in copied]
    print_table(("TABLE", ">ROWS", "SHA256"), rows, empty="")
    print_text(f"Copied {clean(places[0].shown)} to {clean(places[1].shown)}; each table is what it was.")
    print_text(_next(places[1]))


def _next(target: StorePlace) -> str:
    """What to set before the service starts again."""
    if target.folder is None:
        setting = f"Set COLA_DATABASE={target.shown} (with its password), and COLA_DATA_DIR as before"
    else:
        setting = (
            f"Unset COLA_DATABASE, and set COLA_DATA_DIR={target.folder}, where the objects must be, too"
        )
    return f"{setting}; then `cola serve`. Never serve the old store again: both name the same objects."
