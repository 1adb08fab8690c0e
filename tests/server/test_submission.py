"""A submission becomes a whole job, once, or nothing at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import BASE_MODEL, ROWS, Served, description, serving
from torch import nn

from cola_runtime.adapters import module_registry
from cola_runtime.client.sdk import Client
from cola_runtime.encodings import Encoding
from cola_runtime.errors import Conflict, InvalidInput, QuotaExceeded, Unavailable
from cola_runtime.jobs.plan import training_plan
from cola_runtime.server.admission import Submission
from cola_runtime.server.limits import Limits
from cola_runtime.spec import JobSpec

LONG_ROW = json.dumps({"prompt": "a" * 300, "completion": "b"}).encode()


MODULE = {"kind": "module", "name": "gated"}


def submission(training: bytes = ROWS, **fields: Any) -> Submission:
    spec = {"name": "greeter", "base_model": BASE_MODEL, "rows_per_step": 4, **fields}
    return Submission(spec_json=json.dumps(spec), training=training, training_name="train.jsonl")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an operator registered: one that needs an option, one of a wrong shape, one with a buffer."""

    def gated(inputs: int, outputs: int, options: Mapping[str, Any]) -> nn.Module:
        if "width" not in options:
            raise ValueError("width is missing")
        return nn.Linear(inputs, outputs)

    monkeypatch.setattr(module_registry, "_factories", {})
    module_registry.module_shapes.cache_clear()
    module_registry.register_adapter_module("gated", gated)
    module_registry.register_adapter_module("flat", lambda inputs, outputs, options: nn.Linear(inputs, 1))
    module_registry.register_adapter_module("bent", lambda inputs, outputs, options: nn.BatchNorm1d(inputs))
    yield
    module_registry.module_shapes.cache_clear()


def submit(served: Served, sent: Submission, tenant: str = "alice") -> Any:
    return served.run(served.service.submit(served.tenants[tenant], sent))


COLLABORATION = {"group": "a-name-that-nobody-guesses"}
MERGED_MODULE = {"kind": "module", "name": "mine", "target_modules": "attention"}


@pytest.mark.usefixtures("modules")
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
        (submission(task={"kind": "regression"}), "TASK_UNSUPPORTED", ("job.task", "causal_lm")),
        (submission(b'{"text": "a", "label": 1}'), "TASK_FORMAT", ("train.jsonl", "labelled")),
        (submission(learing_rate=1), "UNKNOWN_FIELD", ("job.learing_rate",)),
        (submission(base_model="../etc"), "BASE_MODEL_UNKNOWN", ("job.base_model", BASE_MODEL)),
        (submission(base_model="tiny-lama"), "BASE_MODEL_UNKNOWN", ("did you mean 'tiny-llama'",)),
        (submission(adapter={"target_modules": ["k_proj"]}), "NO_MODULE_MATCHED", ("k_proj", "q_proj")),
        (
            submission(mode="merged", adapter={"kind": "mlp"}),
            "MERGED_NEEDS_LINEAR",
            ("job.adapter", "mlp", "lora, linearized_lora, linear", "unmerged"),
        ),
        (
            submission(collaboration=COLLABORATION, adapter=[{"target_modules": "mlp"}, MERGED_MODULE]),
            "MERGED_NEEDS_LINEAR",
            ("module", "no matrix"),
        ),
        (submission(collaboration={"group": "too-short"}), "SPEC_INVALID", ("job.collaboration.group",)),
        (
            submission(collaboration=COLLABORATION | {"wieght": 2}),
            "UNKNOWN_FIELD",
            ("job.collaboration.wieght", "did you mean 'weight'"),
        ),
        (submission(collaboration=COLLABORATION, mode="unmerged"), "SPEC_INVALID", ("always merged",)),
        (
            submission(adapter=MODULE | {"name": "gatd"}),
            "ADAPTER_MODULE_UNKNOWN",
            ("'gatd'", "bent, flat, gated"),
        ),
        (submission(adapter=MODULE), "ADAPTER_MODULE_INVALID", ("'gated'", "ValueError: width is missing")),
        (submission(adapter=[MODULE]), "ADAPTER_MODULE_INVALID", ("'gated'", "ValueError: width is missing")),
        (submission(adapter=MODULE | {"name": "flat"}), "ADAPTER_MODULE_INVALID", ("(2, 1)", "(2, 16)")),
        (submission(adapter=MODULE | {"name": "bent"}), "ADAPTER_MODULE_INVALID", ("buffers",)),
        (
            submission(inner_steps=2, encoding="adapter_gradient"),
            "INNER_STEPS_NEED_ACTIVATIONS",
            ("job.encoding", "adapter_gradient", "inner_steps 1"),
        ),
        (submission(inner_steps=65), "SPEC_INVALID", ("job.inner_steps", "64")),
        (submission(passes=1000, rows_per_step=1, name="x/y"), "SPEC_INVALID", ("job.name",)),
        (
            submission(adapter={"kind": "mlp"}, encoding="weight_gradient"),
            "ENCODING_UNSUPPORTED",
            ("job.encoding", "mlp at q_proj, up_proj", "auto, activations, adapter_gradient"),
        ),
        (
            submission(compression="low_rank"),
            "COMPRESSION_UNSUPPORTED",
            ("job.compression", "lora at q_proj, up_proj", "none, bfloat16, int8"),
        ),
        (
            submission(adapter={"kind": "linear"}, encoding="activations", compression="low_rank"),
            "COMPRESSION_UNSUPPORTED",
            ("activations", "weight_gradient"),
        ),
        (submission(compression="int4"), "SPEC_INVALID", ("job.compression", "int8")),
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


def test_a_registered_module_with_good_options_is_taken(served: Served, modules: None) -> None:
    sent = submission(adapter=MODULE | {"options": {"width": 3}}, encoding="activations")
    assert submit(served, sent).state == "queued"


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


def test_of_a_hundred_submissions_at_once_only_the_cap_is_taken_and_the_others_leave_nothing(
    served: Served,
) -> None:
    most = served.service.limits.active_jobs

    async def hundred() -> list[Any]:
        calls = (served.service.submit(served.tenants["alice"], submission()) for _ in range(100))
        return await asyncio.gather(*calls, return_exceptions=True)

    results = served.run(hundred())
    refused = [each for each in results if isinstance(each, QuotaExceeded)]
    assert (len(refused), len(results) - len(refused)) == (100 - most, most)
    assert {each.reason for each in refused} == {"QUOTA_JOBS"}
    assert len(served.stored_files()) == len(served.run(served.store.jobs(limit=200))) == most
    assert len(served.runner.started) == most
    submit(served, submission(), tenant="bob")


def chosen(served: Served, sent: Submission) -> tuple[str, str]:
    """The job's encoding, and what its event says about it."""
    job = submit(served, sent)
    events = served.run(served.store.events(job.job_id))
    return job.encoding, next(event.message for event in events if event.kind == "encoding.chosen")


def test_auto_takes_the_cheapest_encoding_and_says_why(served: Served) -> None:
    encoding, reason = chosen(served, submission())
    assert encoding == "adapter_gradient"
    assert reason.startswith("adapter_gradient: the least time at 125 MB/s, 0.00512 MB up")
    assert chosen(served, submission(adapter={"rank": 256}, rows_per_step=1))[0] == "weight_gradient"
    assert chosen(served, submission(encoding="activations")) == (
        "activations",
        "activations: the job asks for it",
    )


def test_inputs_whose_cheapest_encodings_differ_make_a_mixed_plan(served: Served) -> None:
    parts = [
        {"kind": "lora", "rank": 1, "target_modules": ["q_proj"]},
        {"kind": "mlp", "hidden": 4000, "target_modules": ["up_proj"]},
    ]
    encoding, reason = chosen(served, submission(adapter=parts))
    assert encoding == "mixed"
    assert "adapter_gradient but activations at 2 of the inputs" in reason


def test_a_lossy_job_is_named_so_and_its_record_says_it(served: Served) -> None:
    encoding, reason = chosen(served, submission(compression="int8"))
    assert encoding == "adapter_gradient+int8"
    assert "int8 is lossy" in reason


@pytest.mark.parametrize("encoding", ["auto", *Encoding])
def test_merged_jobs_are_taken_in_every_encoding_and_stay_merged_in_the_record(
    served: Served, encoding: str
) -> None:
    for fields in ({"mode": "merged"}, {"collaboration": COLLABORATION}):
        job = submit(served, submission(encoding=encoding, **fields))
        assert JobSpec.model_validate_json(job.spec_json).mode == "merged"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"dtype": "bfloat16"}, "MERGED_DTYPE"), ({"tied_sites": (1,)}, "MERGED_TIED_WEIGHT")],
)
def test_a_base_model_that_nothing_can_be_merged_into_is_named(
    tokenizer_path: Path, changes: dict[str, Any], reason: str
) -> None:
    base = replace(description(tokenizer_path), **changes)
    spec = JobSpec(name="a", base_model=BASE_MODEL, mode="merged")
    with pytest.raises(InvalidInput) as caught:
        training_plan(spec, base, total_steps=1)
    assert caught.value.reason == reason
    training_plan(spec.model_copy(update={"mode": "unmerged"}), base, total_steps=1)


def test_a_group_and_its_combine_name_a_gang_and_a_lone_job_is_its_own(tokenizer_path: Path) -> None:
    def gang(job_id: str, **fields: Any) -> Any:
        spec = JobSpec.model_validate({"name": "a", "base_model": BASE_MODEL, **fields})
        return training_plan(spec, description(tokenizer_path), total_steps=1).membership(job_id)

    mean = gang("job-1", collaboration=COLLABORATION)
    assert mean == gang("job-2", collaboration=COLLABORATION)
    assert gang("job-2", collaboration=COLLABORATION | {"weight": 3}).gang == mean.gang
    others = [
        gang("job-3", collaboration=COLLABORATION | {"combine": "sum"}),
        gang("job-4", mode="merged"),
        gang("job-5", mode="merged"),
        gang("job-6", collaboration={"group": "job-4-and-its-own-very-secret-name"}),
    ]
    assert len({membership.gang for membership in [mean, *others]}) == 5
    assert gang("job-7") is None


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
