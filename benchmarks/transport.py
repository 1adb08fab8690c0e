"""What the gradient stream costs over a bare gRPC stream that moves the same bytes.

    python benchmarks/transport.py [--quick] [--json] [--seed N]

Two processes over loopback, in the roles of base model and device. One step of the runtime's stream: the
step's tensors leave as packs or tensors and a MicrobatchEnd; the device's end checks frames and checksums,
has whole torch tensors, and sends an adapter's weights and an UpdateEnd back; the base end has them as one
tensor. Nothing is computed with them. One step of the bare stream: the same bytes each way, cut into messages
of 1 MiB beforehand, over a grpc.aio stream_stream method with the same channel options, read and dropped.

  small_tensors  adapter gradients of LoRA r = 8 on all 210 projections of SmolLM2: 420 tensors, 9.8 MB, as
                 views of what a mixed batch's backward pass stacks
  large_tensors  ten float32 tensors of 4 MiB
  activations    x and g of 256 bfloat16 rows at the same sites (x once for q, k, v and gate, up)

CPU is user and system time of both processes, per MB (1e6 bytes) that moved in either direction; both streams
take turns in the same two processes, and so have the same allocator, that of the runtime's actors.
`cpu_over_bare_stream` is the worst case's median of the rounds' ratios.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import grpc
import psutil
import torch
from torch import Tensor

from cola_runtime.base_model.gathered_taps import GatheredTaps
from cola_runtime.device.gradient_link import GradientLink
from cola_runtime.gradients.compression import Compressed
from cola_runtime.machine import keep_freed_memory
from cola_runtime.process_environment import actor_environment, child_environment, set_thread_environment
from cola_runtime.proto import control_pb2
from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.transport.endpoints import (
    GRADIENTS,
    SERVER_OPTIONS,
    STREAM_OPTIONS,
    Connection,
    add_stream_method,
    connect,
)
from cola_runtime.transport.frames import MAX_PAYLOAD_BYTES, Frame, TensorAddress, tensor_frames
from cola_runtime.transport.packs import ReceivedPack
from cola_runtime.transport.reader import FrameLimits, ReceivedTensor
from cola_runtime.transport.stream import FrameStream, ReceivedControl
from cola_runtime.transport.tensors import (
    Parcel,
    from_wire,
    parcels,
    tensors_from_wire,
    to_wire,
    vector_from_wire,
)
from cola_runtime.types import Lease, Segment, TensorKey, TensorKind

ADDRESS = TensorAddress("job-" + "ab" * 16, epoch=1, version=0, kind=TensorKind.BLOB)
SEGMENT = Segment(
    lease=Lease(job_id=ADDRESS.job_id, epoch=1, device_id="d"), version=0, rows=(), loss_denominator=1.0
)
BARE, END = "/bare.Stream/Attach", b"end"
TARGET = 1.3
T = TypeVar("T")
LAYERS, RANK, ROWS, STACKED = 30, 8, 256, 4
PROJECTIONS = {  # in, out, which of the layer's inputs
    "q": (576, 576, 0),
    "k": (576, 192, 0),
    "v": (576, 192, 0),
    "o": (576, 576, 1),
    "gate": (576, 1536, 2),
    "up": (576, 1536, 2),
    "down": (1536, 576, 3),
}
WEIGHTS = LAYERS * sum(RANK * (inputs + outputs) for inputs, outputs, _ in PROJECTIONS.values())
STEP_SECONDS = 60.0

Taps = list[dict[TensorKey, Tensor]]
"""What the base model hands out for one segment, from the last layer on."""


def small_tensors() -> Taps:
    taps: Taps = []
    for layer in reversed(range(LAYERS)):
        gradients = {}
        for number, (inputs, outputs, _) in enumerate(PROJECTIONS.values()):
            site = layer * len(PROJECTIONS) + number
            gradients[TensorKey(site, TensorKind.GRAD_LORA_A)] = torch.randn(STACKED, RANK, inputs)[1]
            gradients[TensorKey(site, TensorKind.GRAD_LORA_B)] = torch.randn(STACKED, outputs, RANK)[1]
        taps.append(gradients)
    return taps


def large_tensors() -> Taps:
    return [{TensorKey(site, TensorKind.GRAD_WEIGHT): torch.randn(1024, 1024)} for site in range(10)]


def activations() -> Taps:
    taps: Taps = []
    for layer in reversed(range(LAYERS)):
        seen: set[int] = set()
        for number, (inputs, outputs, group) in enumerate(PROJECTIONS.values()):
            site, tap = layer * len(PROJECTIONS) + number, {}
            if group not in seen:
                tap[TensorKey(site, TensorKind.INPUT)] = torch.randn(ROWS, inputs).bfloat16()
            tap[TensorKey(site, TensorKind.OUTPUT_GRADIENT)] = torch.randn(ROWS, outputs).bfloat16()
            seen.add(group)
            taps.append(tap)
    return taps


CASES: Mapping[str, Callable[[], Taps]] = {
    "small_tensors": small_tensors,
    "large_tensors": large_tensors,
    "activations": activations,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Some steps of one stream, per step."""

    cpu_seconds: float  # of both processes
    wall_seconds: float
    bytes_both_ways: float

    @property
    def cpu_ms_per_mb(self) -> float:
        return self.cpu_seconds * 1e9 / self.bytes_both_ways


class Steps:
    """The base model's end: hands each accepted stream to whoever asks for steps on it."""

    def __init__(self) -> None:
        self.frames: asyncio.Future[FrameStream[Any]] = asyncio.get_running_loop().create_future()
        self.bare: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def on_frames(self, stream: FrameStream[Any]) -> None:
        stream.accept_tensors(FrameLimits())
        self.frames.set_result(stream)
        await asyncio.Event().wait()

    async def on_bare(self, _: object, context: Any) -> None:
        self.bare.set_result(context)
        await asyncio.Event().wait()

    async def step(self, taps: Taps) -> int:
        """Send the taps, have the weights; returns the bytes of both ways."""
        stream = await self.frames
        before = stream.bytes_sent + stream.bytes_received
        for parcel in outgoing(taps):
            await stream.send_frames(parcel.frames(ADDRESS))
        await stream.send_control(
            control_pb2.GradientControl(microbatch_end=control_pb2.MicrobatchEnd(tensors=len(taps)))
        )
        async for item in stream:
            if isinstance(item, ReceivedControl):
                break
            assert isinstance(item, ReceivedTensor)
            assert from_wire(item).shape == (WEIGHTS,)
        return stream.bytes_sent + stream.bytes_received - before

    async def bare_step(self, messages: Sequence[bytes]) -> int:
        """The messages there, the weights' back."""
        context = await self.bare
        for message in messages:
            await context.write(message)
        await context.write(END)
        moved = sum(map(len, messages))
        while (received := await context.read()) != END:
            moved += len(received)
        return moved


async def device_end(endpoint: str) -> None:
    """The other process: answers steps on both streams until the server goes."""
    stream = await connect(endpoint, GRADIENTS)
    stream.accept_tensors(FrameLimits(packs=True))
    channel = grpc.aio.insecure_channel(endpoint, options=STREAM_OPTIONS)
    call = channel.stream_stream(BARE)()
    weights_P = torch.randn(WEIGHTS)
    with suppress(grpc.RpcError), ThreadPoolExecutor(1) as thread:
        await asyncio.gather(_answer(stream, weights_P, thread), _answer_bare(call, weights_P))


async def _answer(stream: Connection[Any], weights_P: Tensor, thread: ThreadPoolExecutor) -> None:
    """As a device does: frames are read on the loop, checked and unpacked on the worker thread."""
    loop = asyncio.get_running_loop()
    address = ADDRESS._replace(kind=TensorKind.WEIGHTS)
    link = GradientLink(stream)

    def unpacked(messages: list[bytes]) -> bool:
        ended = False
        for item in link.decode(messages):
            ended |= isinstance(item, ReceivedControl)
            if isinstance(item, ReceivedTensor):
                from_wire(item)
            elif isinstance(item, ReceivedPack) and item.contents.packed.keys[0].kind < TensorKind.INPUT:
                vector_from_wire(item)
            elif isinstance(item, ReceivedPack):
                tensors_from_wire(item, torch.float32)
        return ended

    def update() -> list[tuple[bytes]]:
        return [(b"".join(frame),) for frame in tensor_frames(address, to_wire(weights_P))]

    async def on_messages(messages: list[bytes]) -> None:
        if await loop.run_in_executor(thread, unpacked, messages):
            await stream.send_frames(await loop.run_in_executor(thread, update))
            end = control_pb2.GradientControl(update_end=control_pb2.UpdateEnd(version=1))
            await stream.send_control(end)

    await link.serve(on_messages)


async def _answer_bare(call: Any, weights_P: Tensor) -> None:
    messages = cut(tensor_frames(ADDRESS, to_wire(weights_P)))
    await call.write(b"hello")
    while (received := await call.read()) is not grpc.aio.EOF:
        if received == END:
            for message in messages:
                await call.write(message)
            await call.write(END)


def outgoing(taps: Taps) -> list[Parcel]:
    """As the base model's service and gradient server make them of one segment's taps."""
    made: list[Parcel] = []

    def send(_: Segment, tensors: Mapping[TensorKey, Compressed]) -> Counter[int]:
        made.extend(parcels(tensors))
        return Counter()

    gathered = GatheredTaps(SEGMENT, send)
    for tap in taps:
        gathered.add(tap)
    gathered.flush()
    return made


def cut(frames: Iterable[Frame]) -> list[bytes]:
    """The frames' bytes as messages of 1 MiB and a rest."""
    content = b"".join(part for frame in frames for part in frame)
    starts = range(0, len(content), MAX_PAYLOAD_BYTES)
    return [content[start : start + MAX_PAYLOAD_BYTES] for start in starts]


async def measured(step: Callable[[], Coroutine[Any, Any, int]], count: int, peer: psutil.Process) -> Round:
    own = psutil.Process()
    cpu, wall, moved = _cpu(own) + _cpu(peer), time.perf_counter(), 0
    for _ in range(count):
        async with asyncio.timeout(STEP_SECONDS):
            moved += await step()
    return Round(
        cpu_seconds=(_cpu(own) + _cpu(peer) - cpu) / count,
        wall_seconds=(time.perf_counter() - wall) / count,
        bytes_both_ways=moved / count,
    )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def run_case(
    taps: Taps, base: Steps, peer: psutil.Process, *, rounds: int, steps: int
) -> dict[str, float]:
    messages = cut(frame for parcel in outgoing(taps) for frame in parcel.frames(ADDRESS))

    async def framed() -> int:
        return await base.step(taps)

    async def bare() -> int:
        return await base.bare_step(messages)

    ours: list[Round] = []
    theirs: list[Round] = []
    turns = [(ours, framed), (theirs, bare)]
    for number in range(rounds + 1):
        turns.reverse()
        for kept, step in turns:
            taken = await measured(step, steps, peer)
            if number > 0:  # the first round touches memory for the first time
                kept.append(taken)
    ratios = [a.cpu_ms_per_mb / b.cpu_ms_per_mb for a, b in zip(ours, theirs, strict=True)]
    return {
        "cpu_over_bare": statistics.median(ratios),
        "lowest_round": min(ratios),
        "highest_round": max(ratios),
        "cpu_ms_per_mb": statistics.median(a.cpu_ms_per_mb for a in ours),
        "bare_cpu_ms_per_mb": statistics.median(b.cpu_ms_per_mb for b in theirs),
        "step_ms": 1e3 * statistics.median(a.wall_seconds for a in ours),
        "bare_step_ms": 1e3 * statistics.median(b.wall_seconds for b in theirs),
        "megabytes": ours[0].bytes_both_ways / 1e6,
    }


async def run_all(*, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    base = Steps()
    server = grpc.aio.server(options=(*STREAM_OPTIONS, *SERVER_OPTIONS))
    add_stream_method(server, GRADIENTS, base.on_frames)
    server.add_generic_rpc_handlers((_bare(base),))
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    peer = await asyncio.create_subprocess_exec(sys.executable, __file__, "--device-end", endpoint)
    try:
        async with asyncio.timeout(STEP_SECONDS):
            await base.frames
            await (await base.bare).read()
        process = psutil.Process(peer.pid)
        return {
            name: await run_case(case(), base, process, rounds=rounds, steps=steps)
            for name, case in CASES.items()
        }
    finally:
        await server.stop(0)
        peer.terminate()
        await peer.wait()


def _bare(base: Steps) -> Any:
    service, _, method = BARE.strip("/").partition("/")
    return grpc.method_handlers_generic_handler(
        service, {method: grpc.stream_stream_rpc_method_handler(base.on_bare)}
    )


def begin_as_an_actor() -> None:
    """Start this process over, unless it has the allocator that base models and devices are started with."""
    wanted = actor_environment()
    if wanted.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], child_environment(**wanted))


def in_a_thread(work: Coroutine[Any, Any, T]) -> T:
    """Where Ray runs an actor's event loop: jemalloc treats the main thread's memory otherwise."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, work).result()


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--device-end", metavar="ENDPOINT", help="be the other process of a run")
    arguments = parser.parse_args()
    begin_as_an_actor()
    set_thread_environment(1)
    torch.set_num_threads(1)
    keep_freed_memory()
    if arguments.device_end:
        in_a_thread(device_end(arguments.device_end))
        return
    torch.manual_seed(arguments.seed)
    started = datetime.now(UTC)
    cases = in_a_thread(run_all(rounds=5 if arguments.quick else 11, steps=10 if arguments.quick else 20))
    results = {
        "cpu_over_bare_stream": max(case["cpu_over_bare"] for case in cases.values()),
        "target": TARGET,
        "cases": cases,
    }
    emit(record("transport", results, seed=arguments.seed, started=started), arguments.json)


if __name__ == "__main__":
    main()
