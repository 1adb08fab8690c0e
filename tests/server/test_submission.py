"""A submission becomes a whole job, once, or nothing at all."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import BASE_MODEL, ROWS, Served, serving

from cola_runtime.client.sdk import Client
from cola_runtime.errors import Conflict, InvalidInput, QuotaExceeded, Unavailable
from cola_runtime.server.admission import Submission, choose_encoding
from cola_runtime.server.limits import Limits
from cola_runtime.spec import JobSpec
from cola_runtime.types import Encoding

LONG_ROW = json.dumps({"prompt": "a" * 300, "completion": "b"}).encode()


def submission(training: bytes = ROWS, **fields: Any) -> Submission:
    spec = {"name": "greeter", "base_model": BASE_MODEL, "rows_per_step": 4, **fields}
    return Submission(spec_json=json.dumps(spec), training=training, training_name="train.jsonl")


def submit(served: Served, sent: Submission, tenant: str = "alice") -> Any:
    return served.run(served.service.submit(served.tenants[tenant], sent))


@pytest.mark.parametrize(
    ("sent", "reason", "parts"),
    [
        (submission(b""), "DATASET_EMPTY", ("train.jsonl",)),
        (submission(b"\n \n"), "DATASET_EMPTY", ("train.jsonl",)),
        (submission(ROWS + b'{"text": 1}'), "DATASET_RECORD", ("train.jsonl:21", "text")),
        (submission(ROWS + b'{"prompt": }'), "DATASET_JSON", ("train.jsonl:21:12",)),
        (submission(LONG_ROW), "ROW_TOO_LONG", ("train.jsonl:1", "256 tokens", "302 tokens", "max_length")),
        (submission(max_length=500), "MAX_LENGTH_ABOVE_CONTEXT", ("256", "500")),
        (submission(adapter={"rank": 0}), "SPEC_INVALID", ("job.adapter.rank", "1")),
        (submission(adapter={"rank": 10**9}), "SPEC_INVALID", ("job.adapter.rank", "256")),
        (submission(learing_rate=1), "UNKNOWN_FIELD", ("job.learing_rate",)),
        (submission(base_model="../etc"), "BASE_MODEL_UNKNOWN", ("job.base_model", BASE_MODEL)),
        (submission(base_model="tiny-lama"), "BASE_MODEL_UNKNOWN", ("did you mean 'tiny-llama'",)),
        (submission(adapter={"target_modules": ["k_proj"]}), "NO_MODULE_MATCHED", ("k_proj", "q_proj")),
        (submission(passes=1000, rows_per_step=1, name="x/y"), "SPEC_INVALID", ("job.name",)),
        (replace(submission(), spec_json="{"), "SPEC_INVALID", ("JSON",)),
        (replace(submission(), spec_json="[" * 10_000), "SPEC_INVALID", ("JSON",)),
        (replace(submission(), spec_json="[]"), "SPEC_INVALID", ("object",)),
        (submission(evaluation={"every": 2}), "EVALUATION_NEEDS_DATA", ("job.evaluation", "held-out")),
        (submission(evaluation={"patience": 2}), "EVALUATION_NEEDS_DATA", ("job.evaluation",)),
        (
            replace(submission(evaluation={"patience": 2}), evaluation=ROWS),
            "SPEC_INVALID",
            ("job.evaluation.patience", "every"),
        ),
        (
            replace(submission(), evaluation=b"", evaluation_name="held.jsonl"),
            "DATASET_EMPTY",
            ("held.jsonl",),
        ),
        (
            replace(submission(), evaluation=LONG_ROW, evaluation_name="held.jsonl"),
            "ROW_TOO_LONG",
            ("held.jsonl:1",),
        ),
    ],
)
def test_whatever_is_wrong_is_named_and_nothing_is_created(
    served: Served, sent: Submission, reason: str, parts: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        submit(served, sent)
    assert caught.value.reason == reason
    text = str(caught.value) + str(caught.value.violations)
    assert all(part in text for part in parts), text
    assert served.nothing_exists()
    with pytest.raises(InvalidInput) as again:
        served.run(served.service.check_dataset(served.tenants["alice"], sent))
    assert again.value.reason == reason


def test_the_record_the_data_and_the_start_belong_together(served: Served) -> None:
    sent = replace(submission(), evaluation=ROWS[: ROWS.index(b"\n") + 1], evaluation_name="held.jsonl")
    job = submit(served, sent)
    assert (job.total_steps, job.encoding, job.training_name) == (5, "adapter_gradient", "train.jsonl")
    assert (served.objects / job.training_key).read_bytes() == ROWS
    assert (served.objects / job.evaluation_key).read_bytes() == ROWS[: ROWS.index(b"\n") + 1]
    assert served.runner.started == [job.job_id]
    kinds = [event.kind for event in served.run(served.store.events(job.job_id))]
    assert kinds == ["job.queued", "encoding.chosen"]


def test_a_record_that_cannot_be_written_takes_its_data_with_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(new: object) -> None:
        assert len(served.stored_files()) == 2  # the data came first
        raise Unavailable("STORAGE_FULL", "the disk is full")

    monkeypatch.setattr(served.store, "create_job", full)
    with pytest.raises(Unavailable):
        submit(served, replace(submission(), evaluation=ROWS))
    assert served.nothing_exists()


def test_a_caller_who_leaves_leaves_a_whole_job(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    create_job = served.store.create_job
    begun = asyncio.Event()

    async def slow(new: Any) -> Any:
        begun.set()
        await asyncio.sleep(0.1)
        return await create_job(new)

    async def leave() -> None:
        call = asyncio.create_task(served.service.submit(served.tenants["alice"], submission()))
        await begun.wait()
        call.cancel()
        while not served.runner.started:  # noqa: ASYNC110 (a fake has no event)
            await asyncio.sleep(0.01)

    monkeypatch.setattr(served.store, "create_job", slow)
    served.run(leave())
    (job,) = served.run(served.store.jobs())
    assert served.stored_files() == [job.training_key]
    assert served.runner.started == [job.job_id]


def test_the_same_key_and_request_give_one_job_also_at_once(served: Served) -> None:
    sent = replace(submission(), idempotency_key="k")

    async def ten() -> list[Any]:
        submit_one = served.service.submit
        return await asyncio.gather(*(submit_one(served.tenants["alice"], sent) for _ in range(10)))

    jobs = served.run(ten())
    assert len({job.job_id for job in jobs}) == 1
    assert served.stored_files() == [jobs[0].training_key]
    events = served.run(served.store.events(jobs[0].job_id))
    assert [event.kind for event in events].count("encoding.chosen") == 1


@pytest.mark.parametrize(
    "other",
    [submission(seed=1), submission(ROWS[:-1]), replace(submission(), evaluation=ROWS)],
    ids=["spec", "data", "evaluation"],
)
def test_the_same_key_for_another_request_is_a_conflict(served: Served, other: Submission) -> None:
    first = submit(served, replace(submission(), idempotency_key="k"))
    with pytest.raises(Conflict) as caught:
        submit(served, replace(other, idempotency_key="k"))
    assert caught.value.reason == "IDEMPOTENCY_CONFLICT"
    assert served.stored_files() == [first.training_key]


def test_another_tenants_equal_key_is_independent(served: Served) -> None:
    sent = replace(submission(), idempotency_key="k")
    jobs = [submit(served, sent, tenant) for tenant in ("alice", "bob")]
    assert jobs[0].job_id != jobs[1].job_id


def test_the_quota_counts_active_jobs_of_one_tenant(tmp_path: Path, tokenizer_path: Path) -> None:
    with serving(tmp_path, tokenizer_path, Limits(active_jobs=2)) as served:
        first = submit(served, replace(submission(), idempotency_key="first"))
        submit(served, submission())
        with pytest.raises(QuotaExceeded, match="limit 2") as caught:
            submit(served, submission())
        assert caught.value.reason == "QUOTA_JOBS"
        assert len(served.stored_files()) == 2
        assert submit(served, replace(submission(), idempotency_key="first")).job_id == first.job_id
        submit(served, submission(), tenant="bob")
        served.run(served.service.cancel(served.tenants["alice"], first.job_id))
        submit(served, submission())


def test_auto_takes_the_encoding_that_sends_least_and_says_why() -> None:
    spec = JobSpec(name="a", base_model="b")
    encoding, reason = choose_encoding(spec)
    assert encoding is Encoding.ADAPTER_GRADIENT
    assert "rank * (d_in + d_out)" in reason
    forced = spec.model_copy(update={"encoding": "activations"})
    assert choose_encoding(forced) == (Encoding.ACTIVATIONS, "activations: the job asks for it")


def test_truncation_is_counted(client: Client, spec: JobSpec) -> None:
    cut = spec.model_copy(update={"truncate": True, "loss": "full"})
    report = client.check_dataset(cut, training=ROWS + LONG_ROW)
    assert (report.truncated, report.longest, report.rows) == (1, 256, 21)


def test_a_row_that_spells_special_tokens_is_reported(client: Client, spec: JobSpec) -> None:
    report = client.check_dataset(spec, training=ROWS + b'{"prompt": "<|im_end|>", "completion": "b"}')
    assert report.literal_markup_rows == 1


def test_an_ended_job_is_not_paused_and_stays_cancelled(served: Served) -> None:
    job, alice, service = submit(served, submission()), served.tenants["alice"], served.service
    served.train(job.job_id, steps=5, succeed=True)
    with pytest.raises(Conflict, match="succeeded"):
        served.run(service.pause(alice, job.job_id))
    assert served.run(service.cancel(alice, job.job_id)).state == "succeeded"
