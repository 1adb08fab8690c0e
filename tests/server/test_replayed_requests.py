"""A submission that somebody recorded on the way, byte for byte, and sends again."""

from __future__ import annotations

from pathlib import Path

from serving import ROWS, Served

from cola_runtime.client.sdk import AsyncClient
from cola_runtime.server.grpc_server import serve_jobs
from cola_runtime.spec import JobSpec
from cola_runtime.testing.chaos import Recorder
from cola_runtime.testing.chaos_proxy import byte_proxy, play_bytes
from cola_runtime.transport.certificates import Authority, write_private
from cola_runtime.transport.tls import PemFiles


async def test_a_recorded_submission_gives_the_same_job_and_no_other(served: Served, spec: JobSpec) -> None:
    recorder = Recorder()
    async with (
        byte_proxy(served.target, recorder) as recorded,
        AsyncClient(base_url=f"grpc://{recorded}", api_key=served.keys["alice"]) as client,
    ):
        handle = await client.submit(spec, training=ROWS, idempotency_key="k")
        submission = list(recorder.sent)
        before = [event async for event in handle.events(follow=False)]
        for _ in range(3):
            assert handle.job_id.encode() in await play_bytes(served.target, submission)
        assert [job.job_id for job in await client.jobs()] == [handle.job_id]
        assert [event async for event in handle.events(follow=False)] == before
    assert served.stored_files() == [f"datasets/{handle.job_id}/training.jsonl"]


async def test_a_recorded_submission_over_tls_is_not_even_a_call(
    served: Served, spec: JobSpec, tmp_path: Path
) -> None:
    authority = Authority.create()
    identity = authority.server(["127.0.0.1"])
    (tmp_path / "server.pem").write_bytes(identity.certificate_pem)
    write_private(tmp_path / "server.key", identity.key_pem)
    (tmp_path / "ca.pem").write_bytes(authority.certificate_pem)
    files = PemFiles(tmp_path / "server.pem", tmp_path / "server.key")
    server, port = served.run(serve_jobs(served.service, "127.0.0.1:0", credentials=files.credentials()))
    recorder, ca = Recorder(), tmp_path / "ca.pem"
    async with (
        byte_proxy(f"127.0.0.1:{port}", recorder) as recorded,
        AsyncClient(base_url=f"grpcs://{recorded}", api_key=served.keys["alice"], ca=ca) as client,
    ):
        handle = await client.submit(spec, training=ROWS)
        assert served.runner.started == [handle.job_id]
        assert handle.job_id.encode() not in await play_bytes(f"127.0.0.1:{port}", recorder.sent)
        assert [job.job_id for job in await client.jobs()] == [handle.job_id]
    assert served.runner.started == [handle.job_id], "the second one reached nobody"
    served.run(server.stop(None))
