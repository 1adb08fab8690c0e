"""`cola bench ...`: measurements of a service on this machine that need nothing but this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cola_runtime.cli.options import JsonFlag

app = typer.Typer(no_args_is_help=True, help="Measure a service on this machine.")


@app.callback()
def group() -> None:
    """Measure a service on this machine."""


@app.command()
def trace(
    base_model: Annotated[
        str | None, typer.Option(help="A known alias, as smollm2-135m-instruct. Default: minilm-l6-v2.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    tenants: Annotated[int, typer.Option(min=1, help="How many train at once.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each.")] = 12,
    rows_per_step: Annotated[int, typer.Option(min=1, help="Rows of each step.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the base model.")] = 1,
    to: Annotated[Path, typer.Option(metavar="TRACE.JSON", help="Where the trace goes.")] = Path(
        "trace.json"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Train and export tenants' adapters through Ray and gRPC, and record a trace of it."""
    from dataclasses import asdict

    from cola_runtime.cli.output import print_json, print_text
    from cola_runtime.cli.trace_views import print_report
    from cola_runtime.demo.traced import SMALL_MODEL, TracedRun, traced_run
    from cola_runtime.machine import machine, versions

    run = TracedRun(
        base_model=base_model or SMALL_MODEL,
        dtype=dtype,
        tenants=tenants,
        steps=steps,
        rows_per_step=rows_per_step,
        threads=threads,
    )
    traced = traced_run(run)
    to.write_bytes(traced.trace)
    recording = {"span_microseconds": traced.span_microseconds, "recording_share": traced.recording_share}
    if as_json:
        about = {"run": asdict(run), "machine": machine(), "versions": versions(), "trace": str(to)}
        print_json({**asdict(traced.report), **recording, **about})
        return
    print_report(traced.report)
    print_text(
        f"Recording a span takes {traced.span_microseconds:.2f} us; all of them took at most "
        f"{traced.recording_share:.4%} of the time."
    )
    print_text("The trace: ", (str(to), "cyan"), "; open it at https://ui.perfetto.dev")
