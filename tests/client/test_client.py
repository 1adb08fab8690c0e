"""The SDK against a real service, in both of its forms."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from serving import ROWS, Served

from cola_runtime.client import job_handle
from cola_runtime.client.sdk import AsyncClient, AsyncJobHandle, Client, JobHandle
from cola_runtime.errors import InvalidInput, JobFailed, NotFound, Unavailable
from cola_runtime.jobs.state import Trigger
from cola_runtime.spec import JobSpec


def test_submit_takes_a_path_bytes_or_rows_and_counts_the_steps(
    client: Client, spec: JobSpec, tmp_path: Path, served: Served
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ROWS)
    rows = [{"prompt": f"Question {n}? ", "completion": f"Answer {n}."} for n in range(20)]
    handles = [client.submit(spec, training=training) for training in (file, str(file), ROWS, rows)]
    assert [handle.job.total_steps for handle in handles] == [5, 5, 5, 5]
    assert served.runner.started == [handle.job_id for handle in handles]
    contents = {served.objects.joinpath(f"datasets/{h.job_id}/training.jsonl").read_bytes() for h in handles}
    assert contents == {ROWS}


def test_wait_returns_the_job_when_it_has_succeeded(client: Client, spec: JobSpec, served: Served) -> None:
    handle = client.submit(spec, training=ROWS)
    training = threading.Thread(
        target=served.train, args=[handle.job_id], kwargs={"steps": 5, "succeed": True}
    )
    training.start()
    job = handle.wait(timeout=10)
    training.join()
    assert (job.state, job.version, job.last_loss) == ("succeeded", 5, 4.0 / 5)


def test_wait_raises_what_the_job_failed_of(client: Client, spec: JobSpec, served: Served) -> None:
    handle = client.submit(spec, training=ROWS)
    served.run(
        served.store.transition(
            handle.job_id, Trigger.FAIL, failure_reason="LOSS_DIVERGED", failure_message="loss is 1e9"
        )
    )
    with pytest.raises(JobFailed, match="loss is 1e9") as caught:
        handle.wait(timeout=10)
    assert caught.value.reason == "LOSS_DIVERGED"
    assert handle.wait(timeout=10, check=False).state == "failed"


def test_wait_gives_up_after_its_timeout(client: Client, spec: JobSpec) -> None:
    with pytest.raises(TimeoutError):
        client.submit(spec, training=ROWS).wait(timeout=0.2)


def test_a_job_is_steered_through_its_handle(client: Client, spec: JobSpec) -> None:
    handle = client.submit(spec, training=ROWS)
    assert handle.job.waiting_reason == "no device is free"
    assert handle.pause().state == "paused"
    assert handle.resume().state == "queued"
    assert handle.cancel().state == "cancelled"
    assert handle.cancel().state == "cancelled"  # again: nothing changes
    assert handle.job.ended


def test_jobs_pages_through_all_of_them(
    client: Client, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola_runtime.client.asynchronous.PAGE", 2)
    made = [client.submit(spec, training=ROWS).job_id for _ in range(5)]
    assert [job.job_id for job in client.jobs()] == made[::-1]  # newest first
    assert [job.job_id for job in client.jobs(limit=3)] == made[:1:-1]


def test_metrics_pages_through_all_steps(
    client: Client, spec: JobSpec, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_handle, "PAGE", 2)
    handle = client.submit(spec, training=ROWS)
    served.train(handle.job_id, steps=5)
    steps = handle.metrics()
    assert [step.step for step in steps] == [1, 2, 3, 4, 5]
    assert (steps[1].loss, steps[1].bytes_up, steps[1].device_id) == (2.0, 2048, "device-0")


def test_evaluations_pages_through_all_and_marks_the_best(
    client: Client, spec: JobSpec, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_handle, "PAGE", 2)
    handle = client.submit(spec, training=ROWS, evaluation=ROWS)
    assert handle.evaluations() == []
    served.train(handle.job_id, steps=0)
    served.evaluate(handle.job_id, loss=4.0, improved=True)
    for loss in (3.0, 2.0, 2.5):
        served.train(handle.job_id, steps=1)
        served.evaluate(handle.job_id, loss=loss, improved=loss != 2.5)
    found = handle.evaluations()
    assert [(each.step, each.value, each.best) for each in found] == [
        (0, 4.0, False),
        (1, 3.0, False),
        (2, 2.0, True),
        (3, 2.5, False),
    ]
    assert (found[0].metrics, found[0].primary, found[0].greater_is_better) == (
        {"loss": 4.0, "perplexity": 2.0},
        "loss",
        False,
    )
    job = handle.refresh()
    assert (job.evaluation_loss_before, job.evaluation_loss_after) == (4.0, 2.5)


def test_the_best_version_is_downloaded_when_asked_for(
    client: Client, spec: JobSpec, served: Served, tmp_path: Path
) -> None:
    handle = client.submit(spec, training=ROWS, evaluation=ROWS)
    served.train(handle.job_id, steps=1)
    served.checkpoint(handle.job_id)
    with pytest.raises(NotFound) as caught:
        handle.download_adapter(tmp_path / "none", version="best")
    assert caught.value.reason == "BEST_UNKNOWN"
    served.evaluate(handle.job_id, loss=2.0, improved=True)
    served.train(handle.job_id, steps=1)
    served.checkpoint(handle.job_id)
    served.evaluate(handle.job_id, loss=3.0, improved=False)
    assert [(each.version, each.best) for each in handle.checkpoints()] == [(1, True), (2, False)]
    folders = [handle.download_adapter(tmp_path / str(v), version=v) for v in ("best", 1, 2, None)]  # type: ignore[arg-type]
    best, first, second, newest = ((each / "adapter_model.safetensors").read_bytes() for each in folders)
    assert best == first != second == newest


def test_a_job_is_found_by_id_prefix_and_name(client: Client, spec: JobSpec) -> None:
    made = client.submit(spec, training=ROWS)
    for ref in (made.job_id, made.job_id[:12], "greeter"):
        assert client.job(ref).job_id == made.job_id
    with pytest.raises(NotFound) as caught:
        client.job("nobody")
    assert caught.value.reason == "JOB_UNKNOWN"


def test_check_dataset_reports_and_creates_nothing(client: Client, spec: JobSpec, served: Served) -> None:
    report = client.check_dataset(spec, training=ROWS, evaluation=ROWS)
    assert (report.rows, report.steps, report.format, report.truncated) == (20, 5, "prompt_completion", 0)
    assert 0 < report.label_tokens < report.tokens
    assert served.nothing_exists()


def test_generate_goes_through_the_tokenizer(client: Client, spec: JobSpec, served: Served) -> None:
    handle = client.submit(spec, training=ROWS)
    answer = handle.generate("abc", max_new_tokens=3)
    assert (answer.text, answer.completion_tokens, answer.adapter_version) == ("cba", 3, 3)
    assert client.generate("xy").text == "yx"
    assert [call["job_id"] for call in served.runner.generation.generated] == [handle.job_id, None]


def test_generate_renders_chat_messages_with_the_models_template(client: Client) -> None:
    answer = client.generate([{"role": "user", "content": "hi"}], max_new_tokens=200)
    assert answer.prompt_tokens == len("Xuser\nhiX\nXassistant\n")  # X: one special token


def test_describe_names_base_models_devices_and_tenant(client: Client) -> None:
    service = client.describe()
    assert (service.tenant, service.base_steps, service.devices[0].pid) == ("alice", 7, 4242)
    model = service.base_models[0]
    assert (model.name, model.context_length, model.details) == ("tiny-llama", 256, {"attention": "sdpa"})
    assert model.sites[0] == "model.layers.0.self_attn.q_proj"


def test_keys_are_made_listed_and_revoked(client: Client, served: Served) -> None:
    made = client.create_key("carol")
    assert made.scopes == ("jobs:read", "jobs:write")
    with Client(base_url=served.url, api_key=made.key) as carol:
        assert carol.describe().tenant == "carol"
    listed = client.keys()
    (known,) = [key for key in listed if key.tenant == "carol"]
    assert client.revoke_key(known.key_id).revoked_at
    with Client(base_url=served.url, api_key=made.key) as carol, pytest.raises(Exception, match="revoked"):
        carol.describe()


def test_an_unreadable_file_is_refused_before_anything_is_sent(spec: JobSpec, tmp_path: Path) -> None:
    with Client(base_url="grpc://127.0.0.1:1") as nobody, pytest.raises(InvalidInput) as caught:
        nobody.submit(spec, training=tmp_path / "missing.jsonl")
    assert caught.value.reason == "DATASET_UNREADABLE"


async def test_the_asynchronous_twin_has_the_same_methods(served: Served, spec: JobSpec) -> None:
    async with AsyncClient(base_url=served.url, api_key=served.keys["alice"]) as client:
        handle = await client.submit(spec, training=ROWS)
        kinds = [event.kind async for event in handle.events(follow=False)]
        assert kinds == ["job.queued", "encoding.chosen"]
        await handle.cancel()
        assert (await handle.wait(timeout=10, check=False)).state == "cancelled"
    for sync, twin in ((Client, AsyncClient), (JobHandle, AsyncJobHandle)):
        names = {name for name in vars(twin) if not name.startswith("_")}
        assert names <= {name for name in vars(sync) if not name.startswith("_")}


async def test_many_calls_go_side_by_side(served: Served, spec: JobSpec) -> None:
    async with AsyncClient(base_url=served.url, api_key=served.keys["alice"]) as client:
        handles = await asyncio.gather(
            *(client.submit(spec, training=ROWS, idempotency_key=f"k{n % 3}") for n in range(4))
        )
        assert len({handle.job_id for handle in handles}) == 3


def test_nobody_at_the_address_is_unavailable_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cola_runtime.client.connection.RETRY_DELAYS_SECONDS", (0.01,))
    with (
        Client(base_url="grpc://127.0.0.1:1", api_key="tml-x") as client,
        pytest.raises(Unavailable) as caught,
    ):
        client.describe()
    assert caught.value.reason == "SERVICE_UNREACHABLE"
    assert "cola serve" in caught.value.remedy
