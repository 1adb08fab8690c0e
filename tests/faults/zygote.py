"""A program that forks a coordinator or a device for every order on its standard input.

Importing torch and opening a first model take seconds and forking takes none; a coordinator here holds its
base model in its own process. What is forked knows nothing of the process that gave the order, and may die as
it likes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import tqdm

from cola_runtime import crash_points
from cola_runtime.base_model.model import TappedModel
from cola_runtime.config import ServiceSettings
from cola_runtime.device.agent import DeviceAgent
from cola_runtime.device.config import DeviceConfig
from cola_runtime.runtime.coordinator import running_coordinator
from cola_runtime.testing.in_process import JOIN_TOKEN, no_devices, running_base_models

TENANT = "alice"


async def coordinate(settings: ServiceSettings, ready: Path) -> None:
    stop = _until_terminated()
    async with (
        running_base_models(settings) as bases,
        running_coordinator(settings, bases, JOIN_TOKEN, devices_at=no_devices) as service,
    ):
        if service.first_key is not None:
            await service.store.create_tenant(TENANT)
            key = await service.store.create_key(TENANT)
            await asyncio.to_thread((settings.data_dir / "key").write_text, key)
        await asyncio.to_thread(ready.touch)
        await stop.wait()
        await service.drain()


async def train(config: DeviceConfig) -> None:
    stop = _until_terminated()
    agent = DeviceAgent(config)
    serving = asyncio.create_task(agent.run())
    await stop.wait()
    await agent.drain()
    await serving


def _until_terminated() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop


def obey(order: dict[str, Any]) -> None:
    """In the forked process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    crash_points.arm(order["crash"])
    if order["role"] == "coordinator":
        settings = ServiceSettings.model_validate_json(order["settings"])
        asyncio.run(coordinate(settings, Path(order["ready"])))
    else:
        asyncio.run(train(DeviceConfig(**order["config"])))


def import_what_a_base_model_needs(model: Path) -> None:
    """By opening one: transformers imports a thousand modules then, six seconds of a processor."""
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # a thread, which no fork would have
    TappedModel.load(model, dtype="float32", attention="sdpa")


def main(model: Path) -> None:
    import_what_a_base_model_needs(model)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead leave no zombies: who has a pid is alive
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            try:
                obey(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
