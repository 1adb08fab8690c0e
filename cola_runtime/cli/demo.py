"""`cola demo`: the whole loop on this machine, on a real model and real text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cola_runtime.cli.options import JsonFlag


def demo(
    output: Annotated[Path, typer.Option("--output", help="Where the report and the adapters go.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each tenant.")] = None,
    kill_device: Annotated[
        bool, typer.Option("--kill-device", help="SIGKILL a busy device in the middle of it.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train four tenants' adapters on one real model, check them with PEFT, write a report."""
    from rich.console import Console

    from cola_runtime.cli.output import print_json
    from cola_runtime.demo.run import DEFAULT_STEPS, run_demo
    from cola_runtime.demo.summary import summary

    console = Console(highlight=False, stderr=as_json)  # with --json, stdout is the report's alone
    report = run_demo(output, steps=steps or DEFAULT_STEPS, kill_device=kill_device, console=console)
    console.print(summary(report, output))
    if as_json:
        print_json(report)
    if not all(all(tenant.checks) for tenant in report.tenants):
        raise typer.Exit(1)
