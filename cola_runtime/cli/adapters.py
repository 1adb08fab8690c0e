"""`cola adapters ...`: what training made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cola_runtime.cli.options import JobArgument, JsonFlag, UrlOption

app = typer.Typer(no_args_is_help=True, help="List and export adapters.")


@app.command("list")
def list_adapters(url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """Adapters that have a checkpoint, and its version."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.job_views import short_id
    from cola_runtime.cli.output import age, byte_size, print_json, print_table, state_text

    with connected(url) as client:
        jobs = [job for job in client.jobs() if job.version > 0]
        newest = [(job, client.job(job.job_id).checkpoints()[-1:]) for job in jobs]
    found = [(job, checkpoints[0]) for job, checkpoints in newest if checkpoints]
    if as_json:
        names = ("job_id", "name", "base_model", "state")
        print_json(
            [{**{name: getattr(job, name) for name in names}, "checkpoint": last} for job, last in found]
        )
        return
    rows = [
        (
            short_id(job.job_id),
            job.name,
            job.base_model,
            " ".join(part.kind for part in job.spec.adapter_parts),
            last.version,
            byte_size(last.bytes),
            state_text(job.state),
            age(last.created_at),
        )
        for job, last in found
    ]
    columns = ("JOB", "NAME", "BASE MODEL", "KIND", ">VERSION", ">CHECKPOINT", "STATE", ">MADE")
    print_table(columns, rows, empty="No adapters yet: no job has made a checkpoint.")


@app.command()
def export(
    job: JobArgument,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="A new or empty folder.")],
    version: Annotated[
        int | None, typer.Option(min=0, help="A checkpoint's version. Default: the newest.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The version with the best evaluation, instead of --version.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write an adapter as a folder that other programs load.

    LoRA and linearized LoRA make a PEFT folder, for `peft.PeftModel.from_pretrained`. PEFT has no other
    kinds: an adapter with linear, mlp or module parts makes a cola folder, for
    `cola_runtime.adapters.attach` (docs/adapter_kinds.md).
    """
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import byte_size, clean, print_json, print_text

    if best and version is not None:
        raise typer.BadParameter("give --best or --version, not both")
    with connected(url) as client:
        handle = client.job(job)
        handle.download_adapter(to, version="best" if best else version, overwrite=overwrite)
    files = {path.name: path.stat().st_size for path in sorted(to.iterdir())}
    if as_json:
        print_json({"job_id": handle.job_id, "name": handle.name, "path": str(to), "files": files})
        return
    print_text(("Exported ", "green"), (clean(handle.name), "bold"), f" to {clean(to)}")
    for name, size in files.items():
        print_text(f"  {clean(name)}  {byte_size(size)}")
