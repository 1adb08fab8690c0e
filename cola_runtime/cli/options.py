"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, errors included.")]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="The service, as grpc://host:port. Default: COLA_BASE_URL."),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's id, the start of it, or its name if only one has it.")
]
FollowFlag = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")]
