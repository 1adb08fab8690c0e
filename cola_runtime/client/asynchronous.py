"""The asynchronous client: every call of the service, once. `sdk.py` drives it for the synchronous twin."""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cola_runtime.client.connection import Connection
from cola_runtime.client.job_handle import GENERATE_TIMEOUT_SECONDS, AsyncJobHandle, Prompt, generate_request
from cola_runtime.client.uploads import Dataset, Upload, upload_of
from cola_runtime.client.values import (
    AuditEntry,
    DatasetReport,
    Generation,
    Job,
    JobEstimate,
    JoinToken,
    Key,
    NewKey,
    RegisteredDevice,
    Service,
    Usage,
    service_from,
    value_from,
)
from cola_runtime.config import client_settings
from cola_runtime.proto import jobs_pb2, operators_pb2
from cola_runtime.spec import JobSpec

UPLOAD_TIMEOUT_SECONDS = 900.0
TRACE_TIMEOUT_SECONDS = 120.0
PAGE = 500


class AsyncClient:
    """A tenant's connection to a service. Every call may raise a ColaError.

    `base_url` and `api_key` default to COLA_BASE_URL and COLA_API_KEY, `ca` (a private authority's
    certificates) to COLA_CA. Calls are retried a few times when the
    service cannot be reached: all but `create_key` are idempotent, a submission by the key it carries.
    """

    def __init__(
        self, *, base_url: str | None = None, api_key: str | None = None, ca: Path | str | None = None
    ) -> None:
        self._connection = Connection(client_settings(base_url=base_url, api_key=api_key, ca=ca))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; jobs go on."""
        await self._connection.close()

    async def submit(
        self,
        spec: JobSpec,
        *,
        training: Dataset,
        evaluation: Dataset | None = None,
        idempotency_key: str | None = None,
    ) -> AsyncJobHandle:
        """Create a job. If this raises, nothing was created.

        The same `idempotency_key` with the same request gives the same job.
        """
        header = jobs_pb2.JobHeader(
            spec_json=spec.model_dump_json(), idempotency_key=idempotency_key or uuid.uuid4().hex
        )
        job = value_from(Job, await self._send("SubmitJob", header, training, evaluation))
        return AsyncJobHandle(self._connection, job)

    async def check_dataset(
        self, spec: JobSpec, *, training: Dataset, evaluation: Dataset | None = None
    ) -> DatasetReport:
        """The checks of `submit`, without creating anything."""
        header = jobs_pb2.JobHeader(spec_json=spec.model_dump_json())
        return value_from(DatasetReport, await self._send("CheckDataset", header, training, evaluation))

    async def estimate(
        self, spec: JobSpec, *, training: Dataset, evaluation: Dataset | None = None
    ) -> JobEstimate:
        """What a job would take, after the checks of `submit`; nothing is created."""
        header = jobs_pb2.JobHeader(spec_json=spec.model_dump_json())
        return value_from(JobEstimate, await self._send("EstimateJob", header, training, evaluation))

    async def jobs(self, *, limit: int | None = None) -> list[Job]:
        """The tenant's jobs in the service's order; all of them, or the first `limit`."""
        found: list[Job] = []
        while limit is None or len(found) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            after = found[-1].job_id if found else ""
            page = await self._connection.call("ListJobs", jobs_pb2.ListJobsRequest(limit=size, after=after))
            found += [value_from(Job, job) for job in page.jobs]
            if len(page.jobs) < size:
                break
        return found

    async def job(self, ref: str) -> AsyncJobHandle:
        """The job with this id, unique start of an id, or unique name."""
        job = value_from(Job, await self._connection.call("GetJob", jobs_pb2.JobRef(job_id=ref)))
        return AsyncJobHandle(self._connection, job)

    async def generate(
        self,
        prompt: Prompt,
        *,
        base_model: str = "",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Continue a text, or answer chat messages, with the bare base model."""
        request = generate_request(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        request.base_model = base_model
        answer = await self._connection.call("Generate", request, timeout_seconds=GENERATE_TIMEOUT_SECONDS)
        return value_from(Generation, answer)

    async def describe(self) -> Service:
        """Base models, devices and the tenant that the key belongs to."""
        return service_from(await self._connection.call("DescribeService", jobs_pb2.DescribeServiceRequest()))

    async def create_key(
        self,
        tenant: str,
        *,
        scopes: Sequence[str] = (),
        weight: float | None = None,
        tokens_per_minute: int | None = None,
        concurrent_jobs: int | None = None,
        total_steps: int | None = None,
        pinned_bytes: int | None = None,
        expires_in_seconds: int = 0,
    ) -> NewKey:
        """A new API key; the tenant is created if need be. Needs the scope `admin`.

        Weight and caps are the tenant's: None leaves one as it is, a cap of 0 takes it away. With 0 seconds
        the key does not end by itself.
        """
        request = jobs_pb2.CreateKeyRequest(
            tenant=tenant,
            scopes=scopes,
            weight=weight,
            tokens_per_minute=tokens_per_minute,
            concurrent_jobs=concurrent_jobs,
            total_steps=total_steps,
            pinned_bytes=pinned_bytes,
            expires_in_seconds=expires_in_seconds,
        )
        return value_from(NewKey, await self._connection.call("CreateKey", request, retry=False))

    async def keys(self) -> list[Key]:
        """What is known of every API key. Needs the scope `admin`."""
        answer = await self._connection.call("ListKeys", jobs_pb2.ListKeysRequest())
        return [value_from(Key, key) for key in answer.keys]

    async def revoke_key(self, key_id: str) -> Key:
        """Make a key open nothing from now on. Needs the scope `admin`."""
        return value_from(
            Key, await self._connection.call("RevokeKey", jobs_pb2.RevokeKeyRequest(key_id=key_id))
        )

    async def usage(self) -> Usage:
        """What the tenant's jobs have used."""
        return value_from(Usage, await self._connection.call("GetUsage", jobs_pb2.GetUsageRequest()))

    async def usage_of_all(self) -> list[Usage]:
        """Of every tenant, by name. Needs the scope `admin`."""
        answer = await self._connection.call("ListUsage", jobs_pb2.ListUsageRequest())
        return [value_from(Usage, usage) for usage in answer.usage]

    async def start_trace(self) -> None:
        """Record what the whole service does, until `stop_trace`. Needs the scope `admin`.

        Conflict `TRACE_RECORDING` when somebody records already.
        """
        await self._connection.call("StartTrace", jobs_pb2.StartTraceRequest(), retry=False)

    async def stop_trace(self) -> bytes:
        """The trace since `start_trace`: a JSON file for Perfetto. Needs the scope `admin`."""
        request = jobs_pb2.StopTraceRequest()
        chunks = self._connection.stream("StopTrace", request, timeout_seconds=TRACE_TIMEOUT_SECONDS)
        return b"".join([chunk.content async for chunk in chunks])

    async def create_join_token(
        self, trust_class: str, *, reusable: bool = False, valid_seconds: int = 0
    ) -> JoinToken:
        """What lets a device join (0 seconds: for a day). Needs the scope `admin`."""
        request = operators_pb2.CreateJoinTokenRequest(
            trust_class=trust_class, reusable=reusable, valid_seconds=valid_seconds
        )
        return value_from(JoinToken, await self._connection.call("CreateJoinToken", request, retry=False))

    async def registered_devices(self) -> list[RegisteredDevice]:
        """Devices that hold a certificate, connected or not. Needs the scope `admin`."""
        answer = await self._connection.call("ListDevices", operators_pb2.ListDevicesRequest())
        return [value_from(RegisteredDevice, device) for device in answer.devices]

    async def revoke_device(self, device_id: str) -> RegisteredDevice:
        """It is let in no more; its jobs go on elsewhere. Needs the scope `admin`."""
        request = operators_pb2.RevokeDeviceRequest(device_id=device_id)
        return value_from(RegisteredDevice, await self._connection.call("RevokeDevice", request))

    async def reinstate_device(self, device_id: str) -> RegisteredDevice:
        """Take a device out of quarantine. Needs the scope `admin`."""
        request = operators_pb2.ReinstateDeviceRequest(device_id=device_id)
        return value_from(RegisteredDevice, await self._connection.call("ReinstateDevice", request))

    async def audit(self, *, after: int = 0, limit: int = 100) -> list[AuditEntry]:
        """Oldest first: entries above `after`, or with 0 the newest ones. Needs the scope `admin`."""
        request = operators_pb2.ListAuditRequest(after=after, limit=limit)
        answer = await self._connection.call("ListAudit", request)
        return [value_from(AuditEntry, entry) for entry in answer.entries]

    async def _send(
        self, rpc: str, header: jobs_pb2.JobHeader, training: Dataset, evaluation: Dataset | None
    ) -> Any:
        data = upload_of(training, name="training")
        held_out = upload_of(evaluation, name="evaluation") if evaluation is not None else None
        header.training_name = data.name
        header.evaluation_name = held_out.name if held_out else ""
        parts = functools.partial(_parts, header, data, held_out)
        return await self._connection.call(rpc, parts, timeout_seconds=UPLOAD_TIMEOUT_SECONDS)


async def _parts(
    header: jobs_pb2.JobHeader, training: Upload, evaluation: Upload | None
) -> AsyncIterator[jobs_pb2.SubmitJobRequest]:
    yield jobs_pb2.SubmitJobRequest(header=header)
    async for chunk in training.chunks():
        yield jobs_pb2.SubmitJobRequest(training_chunk=chunk)
    if evaluation is not None:
        async for chunk in evaluation.chunks():
            yield jobs_pb2.SubmitJobRequest(evaluation_chunk=chunk)
