"""`cola doctor`: is everything here that is needed, and does the service answer?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cola_runtime.cli.options import JsonFlag

STYLES = {"ok": "green", "note": "yellow", "fail": "red"}


def doctor(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="SETTINGS.YAML", help="As `cola serve -f`.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check versions, ports, key, disk and Ray. Exit code 1 if something must be done."""
    from rich.text import Text

    from cola_runtime.cli.checks import run_checks
    from cola_runtime.cli.output import print_json, print_table, print_text
    from cola_runtime.config import client_settings, service_settings

    checks = run_checks(service_settings(file), client_settings())
    good = all(check.status != "fail" for check in checks)
    if as_json:
        print_json({"ok": good, "checks": checks})
    else:
        rows = [(Text(c.status, style=STYLES[c.status]), c.name, c.finding, c.remedy) for c in checks]
        print_table(("", "CHECK", "FOUND", "WHAT TO DO"), rows, empty="")
        print_text(("All good.", "green") if good else ("Something must be done.", "red"))
    raise typer.Exit(0 if good else 1)
