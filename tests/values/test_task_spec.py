"""The task of a job: what can be written, what it makes of the adapter, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cola_runtime.adapter_spec import HeadKind
from cola_runtime.errors import InvalidInput
from cola_runtime.job_choices import Task
from cola_runtime.jobs.plan import training_plan
from cola_runtime.spec import JobSpec
from cola_runtime.spec_parsing import parse_job_spec
from cola_runtime.task_spec import CausalLmTask
from cola_runtime.testing.tiny_models import HIDDEN, tiny_sites
from cola_runtime.types import BaseModelDescription, SiteKind


def spec(**fields: Any) -> JobSpec:
    return parse_job_spec({"name": "judge", "base_model": "tiny", **fields})


def base(*tasks: Task) -> BaseModelDescription:
    return BaseModelDescription(
        name="tiny",
        architecture="BertForSequenceClassification",
        context_length=64,
        vocabulary_size=261,
        dtype="float32",
        sites=tiny_sites("bert"),
        gradient_endpoint="127.0.0.1:1",
        tokenizer_path="",
        parameters=1,
        hidden_size=HIDDEN,
        tasks=tasks,
    )


def test_a_job_without_a_task_is_a_causal_language_model() -> None:
    assert spec().task == CausalLmTask()
    assert training_plan(spec(), base(Task.CAUSAL_LM), total_steps=1).adapter.head is None


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ({"kind": "sequence_classification", "labels": ["no", "yes"]}, HeadKind(labels=2)),
        ({"kind": "sequence_classification", "labels": 5}, HeadKind(labels=5)),
        ({"kind": "regression"}, HeadKind(labels=1, problem="regression")),
    ],
)
def test_a_task_adds_its_head_behind_the_catalogue(task: dict[str, Any], head: HeadKind) -> None:
    wanted = spec(task=task)
    assert JobSpec.model_validate_json(wanted.model_dump_json()) == wanted
    adapter = training_plan(
        wanted, base(Task.SEQUENCE_CLASSIFICATION, Task.REGRESSION), total_steps=1
    ).adapter
    assert adapter.head is not None
    kind, site = adapter.head
    assert kind == head
    assert (site.index, site.name, site.kind) == (len(tiny_sites("bert")), "score", SiteKind.HEAD)
    assert (site.in_features, site.out_features) == (HIDDEN, head.labels)
    assert site.input_group not in {other.input_group for other in tiny_sites("bert")}


def test_a_head_alone_is_an_adapter() -> None:
    wanted = spec(adapter=[], task={"kind": "regression"})
    adapter = training_plan(wanted, base(Task.REGRESSION), total_steps=1).adapter
    assert [site.kind for site in adapter.sites] == [SiteKind.HEAD]


def test_a_task_that_the_base_model_does_not_serve_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        training_plan(spec(), base(Task.REGRESSION), total_steps=1)
    assert caught.value.reason == "TASK_UNSUPPORTED"
    assert "causal_lm" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "where", "part"),
    [
        (
            {"task": {"kind": "sequence_clasification"}},
            "job.task.kind",
            "did you mean 'sequence_classification'",
        ),
        ({"task": {"kind": "sequence_classification"}}, "job.task.labels", "Field required"),
        ({"task": {"kind": "sequence_classification", "labels": 1}}, "job.task.labels", "2"),
        ({"task": {"kind": "sequence_classification", "labels": ["a"]}}, "job.task.labels", "2"),
        ({"task": {"kind": "sequence_classification", "labels": ["a", "a"]}}, "job.task", "same name"),
        ({"task": {"kind": "regression", "lables": 3}}, "job.task.lables", "unknown field 'lables'"),
        (
            {"task": {"kind": "sequence_classification", "lables": 3}},
            "job.task.lables",
            "did you mean 'labels'",
        ),
        ({"adapter": []}, "job", "trains nothing"),
        (
            {"adapter": {"kind": "lara"}},
            "job.adapter.kind",
            "unknown adapter kind 'lara'; did you mean 'lora'",
        ),
    ],
)
def test_a_wrong_task_is_named(fields: dict[str, Any], where: str, part: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec(**fields)
    assert any(where in v.where and part in v.message for v in caught.value.violations), (
        caught.value.violations
    )
