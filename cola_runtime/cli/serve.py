"""`cola serve`: the service."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cola_runtime.cli.options import JsonFlag

if TYPE_CHECKING:
    from cola_runtime.errors import ColaError
    from cola_runtime.runtime.coordinator import RunningService


CertificateFlag = Annotated[
    Path | None, typer.Option(metavar="PEM", help="With --key: TLS, which other machines need.")
]
AdvertiseFlag = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="With TLS: how devices reach their port, if not the same."),
]
CheckpointingFlag = Annotated[
    bool | None,
    typer.Option(
        "--activation-checkpointing/--no-activation-checkpointing",
        help="Compute the base model's layers again in the backward pass: less memory, more time.",
    ),
]


FileFlag = Annotated[
    Path | None, typer.Option("--file", "-f", metavar="SETTINGS.YAML", help="Settings; flags go over them.")
]
ListenFlag = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where clients dial in.")]
KeyFlag = Annotated[Path | None, typer.Option(metavar="PEM", help="The certificate's private key.")]
DataFlag = Annotated[Path | None, typer.Option(help="Job store, datasets, checkpoints, join token.")]
NameFlag = Annotated[str | None, typer.Option(help="A known alias, or any name with --model-path.")]
FolderFlag = Annotated[Path | None, typer.Option(help="A folder in transformers' format.")]
DtypeFlag = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")]
QuantizationFlag = Annotated[
    str | None, typer.Option(help="none, int8 or nf4: how the frozen weights are held.")
]
AcceleratorFlag = Annotated[str | None, typer.Option(help="auto, cpu or cuda: where it computes.")]
ReplicasFlag = Annotated[int | None, typer.Option(min=1, help="Processes that compute the base model.")]
ThreadsFlag = Annotated[int | None, typer.Option(min=1, help="Threads of the base model.")]
DevicesFlag = Annotated[int | None, typer.Option(min=0, help="Devices that the service starts itself.")]
RayFlag = Annotated[str | None, typer.Option(help="An existing Ray cluster. Default: RAY_ADDRESS.")]
ModulesFlag = Annotated[
    list[str] | None, typer.Option(metavar="PYTHON.MODULE", help="Registers adapter modules; repeatable.")
]


def serve(
    file: FileFlag = None,
    listen: ListenFlag = None,
    certificate: CertificateFlag = None,
    key: KeyFlag = None,
    advertise: AdvertiseFlag = None,
    data_dir: DataFlag = None,
    base_model: NameFlag = None,
    model_path: FolderFlag = None,
    dtype: DtypeFlag = None,
    quantization: QuantizationFlag = None,
    accelerator: AcceleratorFlag = None,
    replicas: ReplicasFlag = None,
    activation_checkpointing: CheckpointingFlag = None,
    threads: ThreadsFlag = None,
    devices: DevicesFlag = None,
    ray_address: RayFlag = None,
    adapter_module: ModulesFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Run the service until Ctrl-C. At first start it prints a key for a first tenant, once."""
    from cola_runtime.config import service_settings
    from cola_runtime.machine import share_heaps
    from cola_runtime.process_environment import offer_tls_1_3_only

    offer_tls_1_3_only()  # before grpc is imported
    share_heaps()  # before there are threads

    settings = service_settings(
        file,
        listen=listen,
        data_dir=data_dir,
        base_models=[
            {
                "name": base_model,
                "path": model_path,
                "dtype": dtype,
                "quantization": quantization,
                "accelerator": accelerator,
                "activation_checkpointing": activation_checkpointing,
                "threads": threads,
                "replicas": replicas,
            }
        ],
        devices={"count": devices, "advertise": advertise},
        tls={"certificate": certificate, "key": key},
        ray_address=ray_address,
        adapter_modules=adapter_module,
    )
    from cola_runtime.runtime import coordinator

    coordinator.serve(
        settings,
        on_ready=lambda service: announce(service, as_json=as_json),
        leave=lambda error: leave(error, as_json=as_json),
    )


def leave(error: ColaError, *, as_json: bool) -> NoReturn:
    """Say why and end at once, without the exit handlers of libraries that wait for somebody who is gone."""
    from cola_runtime.cli.failures import report

    code = report(error, as_json=as_json)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def announce(service: RunningService, *, as_json: bool) -> None:
    """Say where the service listens and, once in its life, the first key."""
    from cola_runtime.cli.output import clean, print_json_line, print_text

    url = f"{'grpcs' if service.tls else 'grpc'}://{service.endpoint}"
    names = [base.name for base in service.base_models]
    if as_json:
        print_json_line({"base_url": url, "base_models": names, "first_key": service.first_key})
        return
    print_text(("Serving ", "green"), (clean(", ".join(names)), "bold"), f" on {clean(url)}")
    if service.first_key:
        print_text("A key for the first tenant, shown this once:")
        typer.echo(f"\n  export COLA_BASE_URL={url}\n  export COLA_API_KEY={service.first_key}\n")
    print_text(("Ctrl-C stops the service; jobs go on at its next start.", "dim"))
