"""`cola trace ...`: what a running service does, as a trace for Perfetto and chrome://tracing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

app = typer.Typer(
    no_args_is_help=True, help="Record what a running service does, and read it (needs a key of scope admin)."
)


@app.command()
def record(
    seconds: Annotated[float, typer.Option(min=0, help="How long; Ctrl-C ends it earlier.")] = 10.0,
    to: Annotated[Path, typer.Option(metavar="TRACE.JSON", help="Where the trace goes.")] = Path(
        "trace.json"
    ),
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Record a trace of the whole service. Open it at https://ui.perfetto.dev or in chrome://tracing."""
    from cola_runtime.cli.connect import connected

    with connected(url) as client:
        client.start_trace()
        try:
            time.sleep(seconds)
        except KeyboardInterrupt:
            typer.echo("Ending the recording.", err=True)
        finally:
            trace = client.stop_trace()
    to.write_bytes(trace)
    show(to, as_json=as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="TRACE.JSON", help="As `record` or `cola bench` wrote it.")],
    as_json: JsonFlag = False,
) -> None:
    """How busy base model and devices were, and where the base model waited for what."""
    from cola_runtime.cli.output import print_json, print_text
    from cola_runtime.cli.trace_views import print_report
    from cola_runtime.errors import InvalidInput
    from cola_runtime.trace.report import read_trace

    try:
        report = read_trace(json.loads(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise InvalidInput("TRACE_INVALID", f"cannot read the trace: {error}", where=str(file)) from error
    if as_json:
        print_json(report)
        return
    print_report(report)
    print_text("The trace: ", (str(file), "cyan"), "; open it at https://ui.perfetto.dev")
