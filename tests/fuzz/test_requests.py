"""Every verb with random requests over real gRPC: each call ends, with an answer or with a known reason."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from serving import ROWS, Served, serving

from cola_runtime.client.sdk import Client
from cola_runtime.reasons import REASONS
from cola_runtime.server.grpc_server import SERVICES
from cola_runtime.server.limits import Limits
from cola_runtime.spec import JobSpec
from cola_runtime.transport.status import error_from_rpc
from tests.fuzz.messages import SPEC, Messages
from tests.fuzz.vitals import check_came_back, vitals

VERBS = [method for service in SERVICES for method in service.methods]
CALL_SECONDS = 30.0
AT_ONCE = 32
LIMITS = Limits(chunk_seconds=5.0, upload_wait_seconds=25.0, call_seconds=20.0)


class Fuzzer:
    """Random calls on one channel, counted by what they ended with."""

    def __init__(self, served: Served, seed: int, references: list[str]) -> None:
        self.messages = Messages(seed, references)
        self.ended: Counter[str] = Counter()
        self._target = served.target
        self._channel: Any = None
        self._keys = [served.keys["alice"]] * 8 + [served.keys["bob"], served.keys["reader"], "tml-guess", ""]

    async def run(self, count: int) -> None:
        places = asyncio.Semaphore(AT_ONCE)
        self._channel = grpc.aio.insecure_channel(self._target)

        async def one(verb: MethodDescriptor, raw: bool) -> None:
            async with places:
                await self._one(verb, raw)

        draw = self.messages.draw
        calls = [one(draw.choice(VERBS), draw.random() < 0.1) for _ in range(count)]
        await asyncio.gather(*calls)
        await self._channel.close()

    async def _one(self, verb: MethodDescriptor, raw: bool) -> None:
        draw = self.messages.draw
        kind = "_".join("stream" if s else "unary" for s in (verb.client_streaming, verb.server_streaming))
        call = getattr(self._channel, kind)(f"/{verb.containing_service.full_name}/{verb.name}")
        metadata = (("authorization", f"Bearer {draw.choice(self._keys)}"),)
        count = draw.randrange(5) if verb.client_streaming else 1
        requests = [draw.randbytes(draw.randrange(200)) if raw else self._request(verb) for _ in range(count)]
        try:
            sent: Any = _each(requests) if verb.client_streaming else requests[0]
            answer = call(sent, metadata=metadata, timeout=CALL_SECONDS)
            if verb.server_streaming:
                async for _ in answer:
                    pass
            else:
                GetMessageClass(verb.output_type).FromString(await answer)
            self.ended["OK"] += 1
        except grpc.aio.AioRpcError as failure:
            self._check(verb, failure)

    def _request(self, verb: MethodDescriptor) -> bytes:
        message: Any = self.messages.message(verb.input_type)
        if "follow" in verb.input_type.fields_by_name:
            message.follow = False  # else it stays until the job ends
        return bytes(message.SerializeToString())

    def _check(self, verb: MethodDescriptor, failure: grpc.aio.AioRpcError) -> None:
        error = error_from_rpc(failure)
        self.ended[error.reason] += 1
        known = error.reason in REASONS or error.reason in ("RESOURCE_EXHAUSTED",)
        assert known and error.reason != "INTERNAL", f"{verb.name}: {failure.code()} {failure.details()}"


async def _each(requests: list[bytes]) -> AsyncIterator[bytes]:
    for request in requests:
        yield request


@pytest.fixture
def hall(tmp_path: Path, tokenizer_path: Path) -> Iterator[Served]:
    with serving(tmp_path / "service", tokenizer_path, LIMITS) as served:
        yield served


@pytest.mark.timeout(1800)
def test_no_request_crashes_hangs_or_leaks(hall: Served, request: pytest.FixtureRequest) -> None:
    count = 10_000 if request.config.getoption("--fuzz") else 300
    with Client(base_url=hall.url, api_key=hall.keys["alice"]) as alice:
        spec = JobSpec.model_validate(SPEC)
        jobs = [alice.submit(spec.model_copy(update={"name": f"job{n}"}), training=ROWS) for n in range(4)]
        hall.train(jobs[0].job_id, steps=2)
        hall.checkpoint(jobs[0].job_id)
        references = [each.job_id for each in jobs] + ["job0", "job1", jobs[2].job_id[:12]]
        asyncio.run(Fuzzer(hall, 1, references).run(min(count, 500)))  # what is loaded once is loaded now
        before, began = vitals(hall.loop), time.monotonic()
        fuzzer = Fuzzer(hall, 2, references)
        asyncio.run(fuzzer.run(count))
        seconds = time.monotonic() - began
        assert alice.describe().tenant == "alice", "the service still answers"
        after = vitals(hall.loop)
    print(f"\n{count} requests in {seconds:.0f} s: {dict(fuzzer.ended.most_common())}\n{before}\n{after}")
    check_came_back(before, after)
    assert fuzzer.ended["OK"] > count // 50, "some of them must get through for the others to mean anything"
    assert len(fuzzer.ended) > 8
