"""The gRPC server with its services, and cola.v1.Jobs: translates messages, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import grpc.aio

import cola_runtime
from cola_runtime.config import HostSettings
from cola_runtime.errors import InvalidInput
from cola_runtime.jobs.records import JobRecord, TermChanges
from cola_runtime.proto import jobs_pb2
from cola_runtime.server import convert, keys
from cola_runtime.server.limits import Limits
from cola_runtime.server.operators import OperatorDesk
from cola_runtime.server.operators_grpc import ENROLMENT, OPERATORS, OperatorsMethods
from cola_runtime.server.rpc import Call, Method, RpcHandlers
from cola_runtime.server.rules import rules_of
from cola_runtime.server.service import BEST, FineTuningService
from cola_runtime.server.upload import UploadGate, receive_submission
from cola_runtime.transport.endpoints import HOSTILE_OPTIONS, OnStream, StreamMethod, add_stream_method
from cola_runtime.transport.host_calls import HostCalls
from cola_runtime.transport.tls import bind_port, check_floor

_TERMS = tuple(field.name for field in dataclasses.fields(TermChanges))
SERVICE = jobs_pb2.DESCRIPTOR.services_by_name["Jobs"]
SERVICES = (SERVICE, OPERATORS, ENROLMENT)

# The largest frame of a device stream on the same port (1 MiB and headers) fits the message limit too.
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", Limits().message_bytes),
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients ping every 30 s; without this a silent event stream counts as a flood after the third ping.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    *HOSTILE_OPTIONS,
    ("grpc.so_reuseport", 0),
)


def add_servicers(server: grpc.aio.Server, service: FineTuningService, desk: OperatorDesk) -> None:
    """Serve every verb of the services on `server`, each behind its rule."""
    handlers = RpcHandlers(service.store, service.recall, service.limits)
    of_operators = OperatorsMethods(desk, service.store)
    for descriptor, methods in (
        (SERVICE, JobsMethods(service)),
        (OPERATORS, of_operators),
        (ENROLMENT, of_operators),
    ):
        by_name: dict[str, Method] = {each.name: getattr(methods, each.name) for each in descriptor.methods}
        handler = handlers.generic_handler(descriptor, methods=by_name, rules=rules_of(descriptor))
        server.add_generic_rpc_handlers((handler,))


async def serve_jobs(
    service: FineTuningService,
    bind: str,
    *,
    desk: OperatorDesk | None = None,
    streams: Mapping[StreamMethod, OnStream] | None = None,
    credentials: grpc.ServerCredentials | None = None,
    hosts: HostCalls | None = None,
) -> tuple[grpc.aio.Server, int]:
    """A started server with all services, and device streams on the same port; returns the port too.

    `hosts` counts the calls of each host; without it, by the limits that are usual.

    Raises InvalidInput `PLAINTEXT_REFUSED` off loopback without credentials, Unavailable `PORT_IN_USE`,
    `TLS_FLOOR`.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(hosts or HostCalls(HostSettings()),))
    add_servicers(server, service, desk or OperatorDesk(service.store, service.limits))
    for method, on_stream in (streams or {}).items():
        add_stream_method(server, method, on_stream)
    port = await bind_port(server, bind, credentials=credentials, where="listen")
    await server.start()
    if credentials is not None:
        await check_floor(f"{bind.rpartition(':')[0]}:{port}")
    return server, port


class JobsMethods:
    """One method per rpc, called with the request and an authenticated call."""

    def __init__(self, service: FineTuningService) -> None:
        self._service = service
        self._gate = UploadGate(service.limits)

    async def SubmitJob(self, requests: AsyncIterator[Any], call: Call) -> jobs_pb2.Job:
        async with self._gate.pass_one(call.tenant):
            submission = await receive_submission(requests, self._service.limits)
            return self._job(await self._service.submit(call.tenant, submission))

    async def CheckDataset(self, requests: AsyncIterator[Any], call: Call) -> jobs_pb2.DatasetReport:
        async with self._gate.pass_one(call.tenant):
            submission = await receive_submission(requests, self._service.limits)
            report = await self._service.check_dataset(call.tenant, submission)
        return jobs_pb2.DatasetReport(**dataclasses.asdict(report))

    async def EstimateJob(self, requests: AsyncIterator[Any], call: Call) -> jobs_pb2.JobEstimate:
        async with self._gate.pass_one(call.tenant):
            submission = await receive_submission(requests, self._service.limits)
            return convert.estimate_message(await self._service.estimate(call.tenant, submission))

    async def GetJob(self, request: jobs_pb2.JobRef, call: Call) -> jobs_pb2.Job:
        return self._job(await self._service.job(call.tenant, request.job_id))

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, call: Call) -> jobs_pb2.ListJobsResponse:
        jobs = await self._service.jobs(call.tenant, limit=request.limit, after=request.after)
        return jobs_pb2.ListJobsResponse(jobs=[self._job(job) for job in jobs])

    async def CancelJob(self, request: jobs_pb2.JobRef, call: Call) -> jobs_pb2.Job:
        return self._job(await self._service.cancel(call.tenant, request.job_id))

    async def PauseJob(self, request: jobs_pb2.JobRef, call: Call) -> jobs_pb2.Job:
        return self._job(await self._service.pause(call.tenant, request.job_id))

    async def ResumeJob(self, request: jobs_pb2.JobRef, call: Call) -> jobs_pb2.Job:
        return self._job(await self._service.resume(call.tenant, request.job_id))

    async def WatchEvents(
        self, request: jobs_pb2.WatchEventsRequest, call: Call
    ) -> AsyncIterator[jobs_pb2.Event]:
        pages = self._service.event_pages(
            call.tenant, request.job_id, after=request.after, follow=request.follow
        )
        async for page in pages:
            await call.check_key()
            for event in page:
                yield convert.event_message(event)

    async def ListSteps(self, request: jobs_pb2.ListStepsRequest, call: Call) -> jobs_pb2.ListStepsResponse:
        steps = await self._service.steps(
            call.tenant, request.job_id, after=request.after, limit=request.limit
        )
        return jobs_pb2.ListStepsResponse(steps=[convert.step_message(step) for step in steps])

    async def ListEvaluations(
        self, request: jobs_pb2.ListEvaluationsRequest, call: Call
    ) -> jobs_pb2.ListEvaluationsResponse:
        after = request.after if request.HasField("after") else -1
        found, best_step = await self._service.evaluations(
            call.tenant, request.job_id, after=after, limit=request.limit
        )
        messages = [convert.evaluation_message(each, best_step=best_step) for each in found]
        return jobs_pb2.ListEvaluationsResponse(evaluations=messages)

    async def ListCheckpoints(self, request: jobs_pb2.JobRef, call: Call) -> jobs_pb2.ListCheckpointsResponse:
        found, best_step = await self._service.checkpoints(call.tenant, request.job_id)
        messages = [convert.checkpoint_message(each, best_step=best_step) for each in found]
        return jobs_pb2.ListCheckpointsResponse(checkpoints=messages)

    async def PinCheckpoint(self, request: jobs_pb2.PinCheckpointRequest, call: Call) -> jobs_pb2.Checkpoint:
        version = request.version if request.HasField("version") else None
        pinned = await self._service.pin(call.tenant, request.job_id, version=version)
        best_step = await self._service.best_step(call.tenant, request.job_id)
        return convert.checkpoint_message(pinned, best_step=best_step)

    async def UnpinCheckpoint(
        self, request: jobs_pb2.UnpinCheckpointRequest, call: Call
    ) -> jobs_pb2.Checkpoint:
        unpinned = await self._service.unpin(call.tenant, request.job_id, version=request.version)
        best_step = await self._service.best_step(call.tenant, request.job_id)
        return convert.checkpoint_message(unpinned, best_step=best_step)

    async def ExportAdapter(
        self, request: jobs_pb2.ExportAdapterRequest, call: Call
    ) -> AsyncIterator[jobs_pb2.FileChunk]:
        version = request.version if request.HasField("version") else None
        files = await self._service.export(
            call.tenant, request.job_id, version=BEST if request.best else version
        )
        for name, content in files.items():
            for chunk in self._chunks(content):
                yield jobs_pb2.FileChunk(file_name=name, content=chunk)

    async def Generate(self, request: jobs_pb2.GenerateRequest, call: Call) -> jobs_pb2.GenerateResponse:
        completion = await self._service.generate(
            call.tenant,
            request.job_id,
            _prompt(request),
            base_model=request.base_model,
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
        return jobs_pb2.GenerateResponse(
            text=completion.text,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            adapter_version=completion.adapter_version,
        )

    async def DescribeService(
        self, request: jobs_pb2.DescribeServiceRequest, call: Call
    ) -> jobs_pb2.ServiceDescription:
        names = await self._service.recall.quarantined_devices()
        return convert.description_message(
            self._service.describe(call.tenant), cola_runtime.__version__, names
        )

    async def CreateKey(self, request: jobs_pb2.CreateKeyRequest, call: Call) -> jobs_pb2.NewKey:
        changes = TermChanges(
            **{name: getattr(request, name) for name in _TERMS if request.HasField(name)},
        )
        created = await keys.create_key(
            self._service.store,
            request.tenant,
            request.scopes,
            changes=changes,
            expires_in_seconds=request.expires_in_seconds,
        )
        self._service.terms_changed(created.tenant_id, created.terms)
        return jobs_pb2.NewKey(
            key=created.key,
            tenant=created.tenant,
            scopes=created.scopes,
            **{name: value for name in _TERMS if (value := getattr(created.terms, name)) is not None},
        )

    async def ListKeys(self, request: jobs_pb2.ListKeysRequest, call: Call) -> jobs_pb2.ListKeysResponse:
        found = await self._service.store.keys()
        return jobs_pb2.ListKeysResponse(keys=map(convert.key_message, found))

    async def RevokeKey(self, request: jobs_pb2.RevokeKeyRequest, call: Call) -> jobs_pb2.Key:
        return convert.key_message(await keys.revoke_key(self._service.store, request.key_id))

    async def GetUsage(self, request: jobs_pb2.GetUsageRequest, call: Call) -> jobs_pb2.Usage:
        return convert.usage_message(await self._service.usage(call.tenant))

    async def ListUsage(self, request: jobs_pb2.ListUsageRequest, call: Call) -> jobs_pb2.ListUsageResponse:
        found = await self._service.usage_of_all()
        return jobs_pb2.ListUsageResponse(usage=map(convert.usage_message, found))

    async def StartTrace(
        self, request: jobs_pb2.StartTraceRequest, call: Call
    ) -> jobs_pb2.StartTraceResponse:
        await self._service.start_trace()
        return jobs_pb2.StartTraceResponse()

    async def StopTrace(
        self, request: jobs_pb2.StopTraceRequest, call: Call
    ) -> AsyncIterator[jobs_pb2.FileChunk]:
        trace = await self._service.stop_trace()
        for chunk in self._chunks(trace):
            yield jobs_pb2.FileChunk(file_name="trace.json", content=chunk)

    def _chunks(self, content: bytes) -> Iterator[bytes]:
        chunk_bytes = self._service.limits.export_chunk_bytes
        for start in range(0, max(len(content), 1), chunk_bytes):
            yield content[start : start + chunk_bytes]

    def _job(self, job: JobRecord) -> jobs_pb2.Job:
        return convert.job_message(job, self._service.waiting_reason(job), self._service.replica(job))


def _prompt(request: jobs_pb2.GenerateRequest) -> Any:
    """The text, or the decoded messages; `prompts.py` checks their shape."""
    if not request.messages_json:
        return request.prompt
    try:
        return json.loads(request.messages_json)
    except (ValueError, RecursionError) as error:
        raise InvalidInput("MESSAGES_INVALID", "messages_json is not JSON", where="messages") from error
