"""`cola dataset check`: the service's own checks, without creating anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

if TYPE_CHECKING:
    from cola_runtime.client.sdk import DatasetReport
    from cola_runtime.spec import JobSpec

app = typer.Typer(no_args_is_help=True, help="Check training data.")


@app.callback()
def group() -> None:
    """Check training data."""


@app.command()
def check(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="DATA.JSONL", help="The rows. Default: the job file's `training`."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="JOB.YAML", help="Check for this job.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Check for this base model, without a job file.")
    ] = None,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check every row: format, lengths, labels; count tokens and steps. Nothing is created."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import print_json

    spec, training, evaluation = _request(data, file, base_model)
    with connected(url) as client:
        report = client.check_dataset(spec, training=training, evaluation=evaluation)
    if as_json:
        print_json(report)
    else:
        _print(report, training)


def _request(
    data: Path | None, file: Path | None, base_model: str | None
) -> tuple[JobSpec, Path, Path | None]:
    from cola_runtime.cli.job_file import read_job_file
    from cola_runtime.spec_parsing import parse_job_spec

    if file is not None:
        job = read_job_file(file)
        return job.spec, data or job.training, job.evaluation
    if data is None or base_model is None:
        raise typer.BadParameter("give -f JOB.YAML, or DATA.JSONL and --base-model")
    spec = parse_job_spec({"name": "dataset-check", "base_model": base_model}, source="options")
    return spec, data, None


def _print(report: DatasetReport, training: Path) -> None:
    from cola_runtime.cli.output import clean, print_fields, print_text

    print_text(("Good. ", "green"), f"{clean(training)} can be trained on.")
    share = report.label_tokens / report.tokens if report.tokens else 0.0
    print_fields(
        {
            "format": report.format,
            "rows": f"{report.rows:,}",
            "tokens": f"{report.tokens:,}, of them {report.label_tokens:,} labels ({share:.0%})",
            "row length": f"median {report.median:,}, longest {report.longest:,} tokens",
            "truncated": f"{report.truncated:,} rows" if report.truncated else "none",
            "special tokens": f"spelt in {report.literal_markup_rows:,} rows; encoded as plain text"
            if report.literal_markup_rows
            else "",
            "steps": f"{report.steps:,}",
        }
    )
