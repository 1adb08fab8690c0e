"""`cola config ...`: what can be set, and what is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Settings and job fields.")

JsonAlways = Annotated[bool, typer.Option("--json", help="The output is JSON anyway.")]


@app.command()
def schema(as_json: JsonAlways = False) -> None:
    """JSON Schema of a job file (`job`), of the service's settings and of the client's."""
    from cola_runtime.cli.output import print_json
    from cola_runtime.config import ClientSettings, JoinSettings, ServiceSettings

    print_json(
        {
            "job": job_file_schema(),
            "service": ServiceSettings.model_json_schema(),
            "client": ClientSettings.model_json_schema(),
            "device": JoinSettings.model_json_schema(),
        }
    )


def job_file_schema() -> dict[str, Any]:
    """A job file is a JobSpec with the paths of its data."""
    from cola_runtime.spec import JobSpec

    found = JobSpec.model_json_schema()
    path = {"type": "string", "description": "JSONL file, relative to the job file"}
    found["$defs"]["EvaluationSpec"]["properties"]["data"] = path
    evaluation = {"anyOf": [path, {"$ref": "#/$defs/EvaluationSpec"}]}
    found["properties"] |= {"training": path, "evaluation": evaluation}
    found["required"] = [*found["required"], "training"]
    return found


@app.command()
def show(
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="SETTINGS.YAML", help="As `cola serve -f`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """The settings in force here: defaults, file, environment. Secrets are masked."""
    import yaml

    from cola_runtime.cli.output import print_json
    from cola_runtime.config import client_settings, join_settings, service_settings

    found = {
        "client": client_settings().model_dump(mode="json"),
        "service": service_settings(file).model_dump(mode="json"),
        "device": join_settings().model_dump(mode="json"),
    }
    if as_json:
        print_json(found)
    else:
        typer.echo(yaml.safe_dump(found, sort_keys=False), nl=False)
