"""The `cola` command. Importing this imports nothing heavy: each command loads what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import cola_runtime
from cola_runtime.cli import (
    adapters,
    audit,
    base_models,
    bench,
    config,
    dataset,
    demo,
    device,
    devices,
    doctor,
    generate,
    jobs,
    keys,
    run,
    serve,
    store,
    trace,
    usage,
)
from cola_runtime.cli.failures import report
from cola_runtime.errors import ColaError

INTERRUPTED = 130

app = typer.Typer(
    name="cola",
    help="Fine-tuning as a service: one frozen base model, many tenants, adapters trained on devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 2 usage, 3 validation, 4 key, 5 not found, 6 conflict, 7 quota, 8 job failed, "
    "9 unavailable. Settings: COLA_BASE_URL, COLA_API_KEY.",
)

for command in (
    demo.demo,
    serve.serve,
    run.run,
    generate.generate,
    device.device,
    usage.usage,
    base_models.base_models,
    doctor.doctor,
):
    app.command()(command)
for name, group in (
    ("jobs", jobs.app),
    ("dataset", dataset.app),
    ("adapters", adapters.app),
    ("keys", keys.app),
    ("devices", devices.app),
    ("audit", audit.app),
    ("store", store.app),
    ("config", config.app),
    ("trace", trace.app),
    ("bench", bench.app),
):
    app.add_typer(group, name=name)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cola {cola_runtime.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command and end the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments)
    except ColaError as error:
        sys.exit(report(error, as_json="--json" in arguments))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
