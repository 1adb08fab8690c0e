"""`cola usage`: what a tenant's jobs have used, for its own eyes and for the operator's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

if TYPE_CHECKING:
    from cola_runtime.client.sdk import Usage


def usage(
    of_all: Annotated[
        bool, typer.Option("--all", help="Of every tenant; needs a key of scope admin.")
    ] = False,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Steps, tokens, seconds of base model and devices, and bytes, summed over all your jobs."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import print_json

    with connected(url) as client:
        found = client.usage_of_all() if of_all else [client.usage()]
    if as_json:
        print_json(found if of_all else found[0])
    else:
        _print(found)


def _print(found: Sequence[Usage]) -> None:
    from cola_runtime.cli.output import byte_size, print_table

    columns = ("TENANT", ">JOBS", ">STEPS", ">REPEATED", ">TOKENS", ">HELD-OUT", ">BASE S", ">DEVICE S")
    rows = [
        (
            each.tenant,
            each.jobs,
            each.steps,
            each.repeated_steps,
            f"{each.tokens:,}",
            f"{each.evaluation_tokens:,}",
            f"{each.base_seconds:.1f}",
            f"{each.device_seconds:.1f}",
            byte_size(each.bytes_up),
            byte_size(each.bytes_down),
        )
        for each in found
    ]
    print_table((*columns, ">UP", ">DOWN"), rows, empty="No tenants.")
