"""`cola base-models`: what can be fine-tuned here, and on how many replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cola_runtime.cli.options import JsonFlag, UrlOption

if TYPE_CHECKING:
    from cola_runtime.client.sdk import Replica


def base_models(url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """The base models that jobs can name, with their replicas and what those have computed."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import clean, print_json, print_table

    with connected(url) as client:
        service = client.describe()
    if as_json:
        print_json(list(service.base_models))
        return
    rows = [
        (
            clean(model.name),
            clean(replica.replica),
            replica.state,
            replica.jobs,
            f"{100 * replica.base_busy_seconds / max(service.uptime_seconds, 1e-9):.0f}%",
            f"{replica.base_steps:,}",
            f"{replica.tokens:,}",
            _missed(replica),
        )
        for model in service.base_models
        for replica in model.replicas
    ]
    columns = ("BASE MODEL", "REPLICA", "STATE", ">JOBS", ">BUSY", ">BASE STEPS", ">TOKENS", ">BANK MISSES")
    print_table(columns, rows, empty="No base models.")


def _missed(replica: Replica) -> str:
    """Of the adapters of all base steps, those whose weights had to be brought first."""
    asked = replica.bank_hits + replica.bank_misses
    return f"{replica.bank_misses / asked:.0%}" if asked else "-"
