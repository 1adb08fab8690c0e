"""`cola devices ...`: who may join as a device, and who has."""

from __future__ import annotations

from typing import Annotated

import typer

from cola_runtime.cli.options import JsonFlag, UrlOption

app = typer.Typer(
    no_args_is_help=True, help="Let devices join, list and revoke them (needs a key with scope admin)."
)


@app.command()
def token(
    trust: Annotated[str, typer.Option(help="Of the devices that it lets join: trusted or community.")],
    reusable: Annotated[bool, typer.Option("--reusable", help="For many devices; else for one.")] = False,
    hours: Annotated[float, typer.Option(min=0.01, help="How long it is valid.")] = 24.0,
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a join token. It is printed once and cannot be shown again."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import print_json, print_text

    with connected(url) as client:
        made = client.create_join_token(trust, reusable=reusable, valid_seconds=round(hours * 3600))
    if as_json:
        print_json(made)
        return
    print_text(f"Join token for {trust} devices until {made.expires_at}, shown this once:")
    typer.echo(made.token)


@app.command("list")
def list_devices(url: UrlOption = None, as_json: JsonFlag = False) -> None:
    """Every device that holds a certificate of the service or is in quarantine, connected or not."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import age, clean, print_json, print_table

    with connected(url) as client:
        found = client.registered_devices()
    if as_json:
        print_json(found)
        return
    rows = [
        (
            clean(each.device_id),
            each.trust_class,
            age(each.joined_at),
            each.expires_at,
            age(each.revoked_at),
            f"{each.quarantine_reason}, {age(each.quarantined_at)}" if each.quarantined_at else "-",
        )
        for each in found
    ]
    columns = ("DEVICE", "TRUST", ">JOINED", "CERTIFICATE UNTIL", ">REVOKED", "QUARANTINE")
    print_table(columns, rows, empty="No devices.")


@app.command()
def revoke(
    device_id: Annotated[str, typer.Argument(metavar="DEVICE", help="As `cola devices list` names it.")],
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a device in no more; the jobs that it holds go to others."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import clean, print_json, print_text

    with connected(url) as client:
        revoked = client.revoke_device(device_id)
    if as_json:
        print_json(revoked)
    else:
        print_text(("Revoked ", "green"), clean(revoked.device_id))


@app.command()
def reinstate(
    device_id: Annotated[str, typer.Argument(metavar="DEVICE", help="As `cola devices list` names it.")],
    url: UrlOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Take a device out of quarantine; what it had made stays forgotten."""
    from cola_runtime.cli.connect import connected
    from cola_runtime.cli.output import clean, print_json, print_text

    with connected(url) as client:
        reinstated = client.reinstate_device(device_id)
    if as_json:
        print_json(reinstated)
    else:
        print_text(("Reinstated ", "green"), clean(reinstated.device_id))
