"""`cola run`: submit a job file and watch it to its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

if TYPE_CHECKING:
    from cola_runtime.client.sdk import Job

FileOption = Annotated[
    Path,
    typer.Option("--file", "-f", metavar="JOB.YAML", help="The job: JobSpec fields, training, evaluation."),
]
KeyOption = Annotated[
    str | None,
    typer.Option("--idempotency-key", metavar="KEY", help="The same key and request give the same job."),
]
INTERRUPTED = 130


def run(
    file: FileOption,
    follow: Annotated[
        bool, typer.Option("--follow/--detach", help="Watch the job, or only submit it.")
    ] = True,
    idempotency_key: KeyOption = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Submit a job file and watch it. Ctrl-C stops the watching, not the job."""
    from cola_runtime.cli.output import print_json
    from cola_runtime.cli.watch import watch_job

    job = submit_file(file, idempotency_key=idempotency_key, url=url)
    if not as_json:
        print_submitted(job, watching=follow)
    if follow:
        ended = watch_job(job.job_id, url=url, quiet=as_json)
        if ended is None:
            raise typer.Exit(INTERRUPTED)
        job = ended
    if as_json:
        print_json(job)
    if follow:
        finish(job, as_json=as_json)


def submit_file(file: Path, *, idempotency_key: str | None, url: str | None) -> Job:
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.job_file import read_job_file

    content = read_job_file(file)
    with connected(url) as client:
        handle = client.submit(
            content.spec,
            training=content.training,
            evaluation=content.evaluation,
            idempotency_key=idempotency_key,
        )
        return handle.job


def print_submitted(job: Job, *, watching: bool) -> None:
    from cola_runtime.cli.output import clean, print_text

    print_text(
        ("Submitted ", "green"),
        (clean(job.name), "bold"),
        f" as {clean(job.job_id)}: {job.total_steps} steps",
    )
    if not watching:
        print_text("Watch it: ", (f"cola jobs watch {clean(job.job_id)}", "cyan"))


def finish(job: Job, *, as_json: bool) -> None:
    """Say how the job ended; a job without a result ends the command with exit code 8."""
    from cola_runtime.cli.job_views import held_out
    from cola_runtime.cli.output import clean, print_text
    from cola_runtime.errors import JobFailed

    if job.state != "succeeded":
        if as_json:
            raise typer.Exit(JobFailed.exit_code)
        raise JobFailed(
            job.failure_reason or f"JOB_{job.state.upper()}",
            job.failure_message or f"the job was {job.state} after {job.version} of {job.total_steps} steps",
            remedy=f"`cola jobs logs {job.job_id}` shows its history.",
        )
    if not as_json:
        losses = held_out(job)
        print_text(("Done. ", "green"), f"Held-out loss {losses}. " if losses else "")
        print_text(
            "Get the adapter: ", (f"cola adapters export {clean(job.name)} --to {clean(job.name)}", "cyan")
        )
