"""`cola jobs ...`: everything about one's own jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cola_runtime.cli.options import FollowFlag, JobArgument, JsonFlag, UrlOption
from cola_runtime.cli.run import INTERRUPTED, FileOption, KeyOption, finish, print_submitted, submit_file

if TYPE_CHECKING:
    from cola_runtime.client.sdk import Checkpoint, Event, Job, JobHandle

app = typer.Typer(no_args_is_help=True, help="Submit, watch and steer jobs.")

Answer = TypeVar("Answer")
AfterOption = Annotated[
    int, typer.Option("--after", min=0, metavar="ID", help="Only events behind this one.")
]


@app.command()
def submit(
    file: FileOption, idempotency_key: KeyOption = None, url: UrlOption = None, as_json: JsonFlag = False
) -> None:
    """Submit a job file and return at once."""
    from cola_runtime.cli.output import print_json

    job = submit_file(file, idempotency_key=idempotency_key, url=url)
    if as_json:
        print_json(job)
    else:
        print_submitted(job, watching=False)


@app.command()
def estimate(file: FileOption, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """What a job file would take: steps, tokens, seconds, bytes and memory. Nothing is created."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.job_file import read_job_file
    from cola_runtime.cli.job_views import print_estimate
    from cola_runtime.cli.output import print_json

    content = read_job_file(file)
    with connected(url) as client:
        found = client.estimate(content.spec, training=content.training, evaluation=content.evaluation)
    if as_json:
        print_json(found)
    else:
        print_estimate(found)


@app.command("list")
def list_jobs(
    limit: Annotated[int | None, typer.Option(min=1, help="The newest so many; all without it.")] = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Your jobs, newest first."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.job_views import print_jobs
    from cola_runtime.cli.output import print_json

    with connected(url) as client:
        jobs = client.jobs(limit=limit)
    if as_json:
        print_json(jobs)
    else:
        print_jobs(jobs)


@app.command()
def get(job: JobArgument, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """One job in full."""
    from cola_runtime.cli.job_views import print_job

    _ask(job, lambda handle: handle.job, print_job, url=url, as_json=as_json)


@app.command()
def cancel(job: JobArgument, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """End a job; its checkpoints stay."""
    _ask(job, lambda handle: handle.cancel(), _print_progress, url=url, as_json=as_json)


@app.command()
def pause(job: JobArgument, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """Stop a job after its current step, to be resumed."""
    _ask(job, lambda handle: handle.pause(), _print_progress, url=url, as_json=as_json)


@app.command()
def resume(job: JobArgument, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """Go on with a paused job."""
    _ask(job, lambda handle: handle.resume(), _print_progress, url=url, as_json=as_json)


@app.command()
def watch(job: JobArgument, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """Watch a job live until it ends. Ctrl-C stops the watching, not the job."""
    from cola_runtime.cli.output import print_json
    from cola_runtime.cli.watch import watch_job

    ended = watch_job(job, url=url, quiet=as_json)
    if ended is None:
        raise typer.Exit(INTERRUPTED)
    if as_json:
        print_json(ended)
    finish(ended, as_json=as_json)


@app.command()
def logs(
    job: JobArgument,
    follow: FollowFlag = False,
    after: AfterOption = 0,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """A job's history, one line an event. With --follow and --json: one JSON object a line."""
    from cola_runtime.cli.job_views import event_line
    from cola_runtime.cli.output import stdout

    console = stdout()
    _each_event(
        job,
        lambda event: console.print(event_line(event)),
        follow=follow,
        after=after,
        url=url,
        as_json=as_json,
    )


@app.command()
def events(
    job: JobArgument,
    follow: FollowFlag = False,
    after: AfterOption = 0,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """A job's events with their ids and data. With --follow and --json: one JSON object a line."""
    from cola_runtime.cli.job_views import event_line, print_events
    from cola_runtime.cli.output import stdout

    if follow or as_json:
        console = stdout()
        _each_event(
            job,
            lambda event: console.print(event_line(event)),
            follow=follow,
            after=after,
            url=url,
            as_json=as_json,
        )
        return
    print_events(_events_so_far(job, after=after, url=url))


@app.command()
def metrics(
    job: JobArgument,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")] = False,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Loss, learning rate, tokens and bytes of every step."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.job_views import print_steps, steps_csv
    from cola_runtime.cli.output import print_json

    with connected(url) as client:
        steps = client.job(job).metrics()
    if as_json:
        print_json(steps)
    elif csv:
        sys.stdout.write(steps_csv(steps))
    else:
        print_steps(steps)


@app.command()
def evaluations(job: JobArgument, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """What the held-out rows gave at which step, and which is the best."""
    from cola_runtime.cli.job_views import print_evaluations

    _ask(job, lambda handle: handle.evaluations(), print_evaluations, url=url, as_json=as_json)


@app.command()
def checkpoints(job: JobArgument, url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """The versions that can be exported."""
    from cola_runtime.cli.job_views import print_checkpoints

    _ask(job, lambda handle: handle.checkpoints(), print_checkpoints, url=url, as_json=as_json)


@app.command()
def pin(
    job: JobArgument,
    version: Annotated[int | None, typer.Option(min=0, help="The newest without it.")] = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Keep a checkpoint for good, whatever the service's retention says."""
    _ask(job, lambda handle: handle.pin(version), _print_pin, url=url, as_json=as_json)


@app.command()
def unpin(
    job: JobArgument,
    version: Annotated[int, typer.Option(min=0, help="As `cola jobs checkpoints` lists it.")],
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a checkpoint go as the service's retention says."""
    _ask(job, lambda handle: handle.unpin(version), _print_pin, url=url, as_json=as_json)


def _print_pin(checkpoint: Checkpoint) -> None:
    from cola_runtime.cli.output import byte_size, print_text

    done = "Pinned" if checkpoint.pinned else "Unpinned"
    print_text((f"{done} ", "green"), f"version {checkpoint.version}, {byte_size(checkpoint.bytes)}")


def _ask(
    ref: str,
    question: Callable[[JobHandle], Answer],
    show: Callable[[Answer], None],
    *,
    url: str | None,
    as_json: bool,
) -> None:
    """Ask one thing of a job and print the answer: as JSON, or as `show` does."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import print_json

    with connected(url) as client:
        answer = question(client.job(ref))
    if as_json:
        print_json(answer)
    else:
        show(answer)


def _print_progress(job: Job) -> None:
    from cola_runtime.cli.output import clean, state_text, stdout

    line = state_text(job.state)
    line.append(f"  {clean(job.name)}, step {job.version} of {job.total_steps}", style="default")
    stdout().print(line)


def _events_so_far(ref: str, *, after: int, url: str | None) -> list[Event]:
    from cola_runtime.cli.connect import connected

    with connected(url) as client:
        return list(client.job(ref).events(after=after, follow=False))


def _each_event(
    ref: str, show: Callable[[Event], None], *, follow: bool, after: int, url: str | None, as_json: bool
) -> None:
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import clean, print_json, print_json_line

    if as_json and not follow:
        print_json(_events_so_far(ref, after=after, url=url))
        return
    last = after
    try:
        with connected(url) as client:
            for event in client.job(ref).events(after=after, follow=follow):
                (print_json_line if as_json else show)(event)
                last = event.id
    except KeyboardInterrupt:
        typer.echo(f"Go on here: cola jobs logs {clean(ref)} --follow --after {last}", err=True)
        raise typer.Exit(INTERRUPTED) from None
