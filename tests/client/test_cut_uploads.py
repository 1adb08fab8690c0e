"""An upload that is cut off is sent again whole, by itself, and gives one job."""

from __future__ import annotations

import pytest
from serving import ROWS, Served

from cola_runtime.client.sdk import AsyncClient
from cola_runtime.spec import JobSpec
from cola_runtime.testing.chaos import Chaos, FaultKind, StreamFault, Way
from cola_runtime.testing.chaos_proxy import CHUNK_BYTES, byte_proxy

ROW = b'{"text": "%s"}\n' % (b"a" * 8000)
LARGE = ROW * (2 * 1024 * 1024 // len(ROW))  # in more messages than one
MIDDLE = len(LARGE) // CHUNK_BYTES // 2  # TCP hands over a chunk at most at a time


def client_at(endpoint: str, served: Served) -> AsyncClient:
    return AsyncClient(base_url=f"grpc://{endpoint}", api_key=served.keys["alice"])


async def test_an_upload_whose_connection_is_cut_in_the_middle_is_sent_again_by_itself(
    served: Served, spec: JobSpec
) -> None:
    chaos = Chaos(StreamFault(kind=FaultKind.CUT, way=Way.TO_SERVER, at=MIDDLE))
    async with byte_proxy(served.target, chaos) as cut, client_at(cut, served) as client:
        cut_rows = spec.model_copy(update={"truncate": True, "loss": "full"})
        handle = await client.submit(cut_rows, training=LARGE)
        assert chaos.struck.is_set()
        assert chaos.units[Way.TO_SERVER] > 2 * MIDDLE, "from its first byte"
        assert [job.job_id for job in await client.jobs()] == [handle.job_id]
    key = f"datasets/{handle.job_id}/training.jsonl"
    assert served.stored_files() == [key]
    assert (served.objects / key).read_bytes() == LARGE


async def test_an_upload_whose_answer_is_cut_off_gives_the_job_that_it_made(
    served: Served, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    chaos, submit = Chaos(), served.service.submit

    async def submit_and_be_cut(*arguments: object) -> object:
        job = await submit(*arguments)  # type: ignore[arg-type]
        if not made:
            chaos.strike_next(FaultKind.CUT, Way.TO_CLIENT)
        made.append(job.job_id)
        return job

    made: list[str] = []
    monkeypatch.setattr(served.service, "submit", submit_and_be_cut)
    async with byte_proxy(served.target, chaos) as cut, client_at(cut, served) as client:
        handle = await client.submit(spec, training=ROWS)
        assert chaos.struck.is_set()
        assert made == [handle.job_id, handle.job_id]
        assert [job.job_id for job in await client.jobs()] == [handle.job_id]
    assert served.stored_files() == [f"datasets/{handle.job_id}/training.jsonl"]
