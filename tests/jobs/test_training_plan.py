"""A job's training options reach the device as they were asked for, or are refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from cola_runtime.errors import InvalidInput
from cola_runtime.jobs.plan import TrainingPlan, training_plan
from cola_runtime.spec_parsing import parse_job_spec
from cola_runtime.transport import control
from cola_runtime.types import BaseModelDescription, Site, SiteKind

SITE = Site(index=0, name="q_proj", kind=SiteKind.LINEAR, in_features=4, out_features=4, input_group=0)
BASE = BaseModelDescription(
    name="tiny",
    architecture="LlamaForCausalLM",
    context_length=64,
    vocabulary_size=261,
    dtype="float32",
    sites=(SITE,),
    gradient_endpoint="",
    tokenizer_path="",
    parameters=1,
)


def plan_of(**fields: Any) -> TrainingPlan:
    spec = parse_job_spec({"name": "job", "base_model": "tiny", **fields})
    return training_plan(spec, BASE, total_steps=5)


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"kind": "adamw", "betas": [0.8, 0.95], "eps": 1e-5, "weight_decay": 0.1, "max_grad_norm": 0.5},
        {"kind": "sgd", "momentum": 0.9, "nesterov": True},
        {"kind": "adafactor", "learning_rate": 0.05},
        {"kind": "adafactor", "beta2_decay": -0.5, "eps1": 1e-10, "eps2": 0.01, "d": 2.0},
    ],
)
def test_every_hyper_parameter_reaches_the_device(optimizer: dict[str, Any]) -> None:
    wanted = plan_of(optimizer=optimizer, inner_steps=3).optimizer
    assert wanted.inner_steps == 3
    for name, value in optimizer.items():
        assert getattr(wanted, name) == (tuple(value) if isinstance(value, list) else value)
    message = control.optimizer_to_proto(wanted)
    received = type(message).FromString(message.SerializeToString())
    assert control.optimizer_from_proto(received) == wanted


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"kind": "adamw", "momentum": 0.9}, "adamw has no momentum; of its own it has betas, eps"),
        ({"momentum": 0.9, "nesterov": True}, "adamw has no momentum"),
        ({"kind": "adamw", "d": 2.0}, "adamw has no d;"),
        ({"kind": "sgd", "betas": [0.9, 0.95]}, "sgd has no betas; of its own it has momentum, nesterov"),
        ({"kind": "sgd", "eps2": 0.1}, "sgd has no eps2"),
        ({"kind": "adafactor", "eps": 1e-6}, "adafactor has no eps; of its own it has beta2_decay, eps1"),
        ({"kind": "adafactor", "nesterov": True}, "adafactor has no nesterov"),
        ({"kind": "adafactor", "beta2_decay": 0.8}, "less than or equal to 0"),
        ({"kind": "adafactor", "d": 0.5}, "greater than or equal to 1"),
        ({"kind": "adafactor", "eps1": -1.0}, "greater than or equal to 0"),
        ({"kind": "sgd", "nesterov": True}, "nesterov needs a momentum above 0"),
        ({"kind": "lion"}, "'adamw', 'sgd' or 'adafactor'"),
    ],
)
def test_what_the_optimizer_does_not_have_is_refused_with_the_reason(
    optimizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        plan_of(optimizer=optimizer)
    assert caught.value.reason == "SPEC_INVALID"
    assert caught.value.violations[0].where.startswith("job.optimizer")
    assert message in str(caught.value)


@pytest.mark.parametrize("inner_steps", [0, 65, 1.5, True])
def test_inner_steps_have_a_range(inner_steps: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        plan_of(inner_steps=inner_steps)
    assert caught.value.violations[0].where == "job.inner_steps"


def test_what_is_left_at_its_default_is_never_refused() -> None:
    """A stored spec names every field, whatever the kind."""
    for kind in ("adamw", "sgd", "adafactor"):
        spec = parse_job_spec({"name": "job", "base_model": "tiny", "optimizer": {"kind": kind}})
        assert type(spec).model_validate_json(spec.model_dump_json()) == spec
