"""The planner takes what its own model says is cheapest, group by group, and refuses what cannot be."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
    ModuleKind,
)
from cola_runtime.encodings import Compression, Encoding, TapPlan
from cola_runtime.errors import InvalidInput
from cola_runtime.gradients.planner import Costs, Workload, check_encoding, group_effort, plan_taps
from cola_runtime.jobs.plan import DataSize, as_recorded, job_taps
from cola_runtime.rows import Row
from cola_runtime.spec import JobSpec
from cola_runtime.testing.tiny_models import tiny_sites
from cola_runtime.types import BaseModelDescription, Site, SiteKind

SITES = tiny_sites("llama")
ACTIVATIONS, WEIGHT, ADAPTER = Encoding.ACTIVATIONS, Encoding.WEIGHT_GRADIENT, Encoding.ADAPTER_GRADIENT


def everywhere(kind: AdapterKind, sites: tuple[Site, ...] = SITES) -> AdapterSpec:
    return AdapterSpec(parts=(AdapterPart(kind=kind, sites=sites),), seed=0)


def work(tokens: float, *, microbatches: int = 1, dtype: str = "float32") -> Workload:
    return Workload(tokens=tokens, microbatches=microbatches, base_dtype=dtype)


def square(side: int) -> tuple[Site, ...]:
    return (
        Site(
            index=0, name="m.q_proj", kind=SiteKind.LINEAR, in_features=side, out_features=side, input_group=0
        ),
    )


def chosen(kind: AdapterKind, workload: Workload, costs: Costs | None = None, side: int = 1024) -> Encoding:
    plan, _ = plan_taps(everywhere(kind, square(side)), workload, costs or Costs())
    assert not plan.exceptions
    return plan.encoding


@pytest.mark.parametrize(
    ("kind", "workload", "expected"),
    [
        (LoraKind(rank=8), work(2048), ADAPTER),
        (LoraKind(rank=8), work(7), ACTIVATIONS),
        (LoraKind(rank=8), work(7, dtype="bfloat16"), ACTIVATIONS),
        (LoraKind(rank=8), work(9, dtype="bfloat16"), ADAPTER),
        (LoraKind(rank=8, alpha=12), work(15, dtype="bfloat16"), ACTIVATIONS),  # two bytes against four
        (LoraKind(rank=8, alpha=12), work(17, dtype="bfloat16"), ADAPTER),
        (LinearKind(), work(500), ACTIVATIONS),  # N (d_in + d_out) against d_in d_out: even at 512
        (LinearKind(), work(600), ADAPTER),
        (MlpKind(hidden=64), work(60), ACTIVATIONS),
        (MlpKind(hidden=64), work(80), ADAPTER),
        (ModuleKind(name="unknown_here"), work(10**6), ACTIVATIONS),
    ],
)
def test_the_cheapest_is_where_the_bytes_say(
    kind: AdapterKind, workload: Workload, expected: Encoding
) -> None:
    slow_link = Costs(link_bytes_per_second=1e6)  # only bytes count
    assert chosen(kind, workload, slow_link) is expected


def test_a_rank_of_the_sites_size_makes_the_weight_gradient_smallest() -> None:
    assert chosen(LoraKind(rank=200), work(2048), Costs(link_bytes_per_second=1e6), side=256) is WEIGHT


def test_a_fast_link_and_a_slow_base_model_make_activations_cheapest() -> None:
    assert (
        chosen(LoraKind(rank=8), work(2048), Costs(link_bytes_per_second=1e12, base_flops=1e9)) is ACTIVATIONS
    )


def test_sites_that_share_an_input_send_it_once() -> None:
    def effort(sites: tuple[Site, ...]) -> float:
        group = [(LoraKind(), sites)]
        return group_effort(
            group, work(10), ACTIVATIONS, dtype="float32", compression=Compression.NONE
        ).bytes_up

    assert effort(SITES[:3]) == 4 * 10 * (64 + 64 + 32 + 32)
    assert effort(SITES[:1]) == 4 * 10 * (64 + 64)


def test_every_group_gets_its_own_minimum_and_the_rest_are_exceptions() -> None:
    kind, costs = LoraKind(rank=32), Costs(link_bytes_per_second=1e6)
    plan, reason = plan_taps(everywhere(kind), work(40), costs)
    assert str(plan) == "mixed"
    assert {encoding for _, encoding in plan.exceptions} == {ACTIVATIONS}
    assert [group for group, _ in plan.exceptions] == sorted(group for group, _ in plan.exceptions)
    assert "adapter_gradient but activations at" in reason
    for number in {site.input_group for site in SITES}:
        sites = tuple(site for site in SITES if site.input_group == number)
        seconds = {
            encoding: group_effort(
                [(kind, sites)], work(40), encoding, dtype="float32", compression=Compression.NONE
            ).seconds(costs)
            for encoding in Encoding
        }
        assert seconds[plan.encoding_of(number)] == min(seconds.values())


def test_kinds_at_one_input_agree_on_an_encoding_that_all_of_them_have() -> None:
    """At one x the plan has one entry: an MLP on k keeps LoRA of a huge rank on q from a weight gradient."""
    big = AdapterPart(kind=LoraKind(rank=256), sites=SITES[:1])
    costs = Costs(link_bytes_per_second=1e6)
    alone, _ = plan_taps(AdapterSpec(parts=(big,), seed=0), work(10_000), costs)
    assert alone == TapPlan(WEIGHT)
    beside = AdapterPart(kind=MlpKind(hidden=4), sites=SITES[1:2])
    together, _ = plan_taps(AdapterSpec(parts=(big, beside), seed=0), work(10_000), costs)
    assert together == TapPlan(ADAPTER)


@pytest.mark.parametrize("kind", [MlpKind(), ModuleKind(name="mine")])
def test_a_forced_encoding_that_a_kind_cannot_have_is_refused_by_name(kind: AdapterKind) -> None:
    spec = AdapterSpec(
        parts=(AdapterPart(kind=LoraKind(), sites=SITES[:1]), AdapterPart(kind=kind, sites=SITES[1:3])),
        seed=0,
    )
    with pytest.raises(InvalidInput, match=rf"{kind.kind} at k_proj, v_proj") as caught:
        plan_taps(spec, work(10), Costs(), requested="weight_gradient")
    assert caught.value.reason == "ENCODING_UNSUPPORTED"
    assert "auto, activations, adapter_gradient" in caught.value.remedy
    for possible in (ACTIVATIONS, ADAPTER):
        check_encoding(spec, possible)


@pytest.mark.parametrize("kind", [LoraKind(), LinearizedLoraKind(), LinearKind()])
def test_every_encoding_may_be_forced_for_kinds_that_are_linear_in_x(kind: AdapterKind) -> None:
    for encoding, compression in product(Encoding, (Compression.NONE, Compression.INT8)):
        plan, reason = plan_taps(
            everywhere(kind), work(10), Costs(), requested=encoding, compression=compression
        )
        assert plan == TapPlan(encoding, compression=compression)
        assert "the job asks for it" in reason
        assert ("lossy" in reason) is (compression is not Compression.NONE)


def test_low_rank_is_the_weight_gradient_of_full_rank_kinds_only() -> None:
    low = Compression.LOW_RANK
    plan, _ = plan_taps(everywhere(LinearKind()), work(10), Costs(), compression=low)
    assert plan == TapPlan(WEIGHT, compression=low)
    for spec, requested in ((everywhere(LoraKind()), "auto"), (everywhere(LinearKind()), "activations")):
        with pytest.raises(InvalidInput) as caught:
            plan_taps(spec, work(10), Costs(), requested=requested, compression=low)
        assert caught.value.reason == "COMPRESSION_UNSUPPORTED"


def test_compression_moves_the_break_even() -> None:
    """bfloat16 narrows a float32 gradient (s = 1.5) but not bfloat16 activations."""
    costs, workload = Costs(link_bytes_per_second=1e6), work(12, dtype="bfloat16")
    spec = everywhere(LoraKind(rank=8, alpha=12), square(1024))
    assert plan_taps(spec, workload, costs)[0].encoding is ACTIVATIONS
    assert plan_taps(spec, workload, costs, compression=Compression.BFLOAT16)[0].encoding is ADAPTER


def description() -> BaseModelDescription:
    return BaseModelDescription(
        name="tiny",
        architecture="LlamaForCausalLM",
        context_length=256,
        vocabulary_size=261,
        dtype="float32",
        sites=SITES,
        gradient_endpoint="",
        tokenizer_path="",
        parameters=1,
    )


def planned(job: JobSpec, costs: Costs, *, rows: int = 64, tokens: int = 64 * 40) -> TapPlan:
    adapter = everywhere(LoraKind(rank=32))
    return job_taps(job, description(), adapter, DataSize(rows=rows, tokens=tokens), costs)[0]


def test_a_microbatch_is_what_the_interval_and_the_token_budget_leave() -> None:
    """Taps leave part by part: many small parts make activations cheaper, few large ones gradients."""
    slow = Costs(link_bytes_per_second=1e6, token_budget=1024)
    job = JobSpec(name="a", base_model="tiny", rows_per_step=16)
    assert planned(job, slow).encoding is ADAPTER
    split = job.model_copy(update={"adaptation_interval": 16})
    assert str(planned(split, slow)) == "mixed"
    cut = Costs(link_bytes_per_second=1e6, token_budget=30)
    assert planned(job, cut).encoding is ACTIVATIONS
    assert str(planned(job, slow, rows=1, tokens=40)) == "mixed"  # a step has no more rows than there are


def test_a_recorded_plan_stays_what_it_was_when_the_speeds_change() -> None:
    job = JobSpec(name="a", base_model="tiny", rows_per_step=16)
    then = Costs(link_bytes_per_second=1e6, token_budget=30)
    now = Costs(link_bytes_per_second=1e6, token_budget=1024)
    for compression in ("none", "int8"):
        asked = job.model_copy(update={"compression": compression})
        before = planned(asked, then)
        assert planned(asked, now) != before
        assert planned(as_recorded(asked, str(before)), now) == before
    mixed = job.model_copy(update={"adaptation_interval": 16})
    assert planned(as_recorded(mixed, str(planned(mixed, now))), now) == planned(mixed, now)


def test_an_encoders_sites_are_planned_for_the_sources_tokens() -> None:
    """A long source: x and g are dearer than the factors' gradients there, and only there."""
    sites = tuple(
        Site(index=n, name=f"s{n}", kind=SiteKind.LINEAR, in_features=64, out_features=64, input_group=n)
        for n in range(2)
    )
    costs = Costs(link_bytes_per_second=1.0)  # bytes decide
    tokens, source = np.zeros(4, np.int32), np.zeros(400, np.int32)
    size = DataSize.of([Row(tokens=tokens, weights=np.zeros(4, np.float32), source=source)])
    assert size == DataSize(rows=1, tokens=4, source_tokens=400)
    base = replace(description(), sites=sites, source_groups=(0,))
    job = JobSpec.model_validate({"name": "j", "base_model": "m", "rows_per_step": 1})
    plan, _ = job_taps(job, base, everywhere(LoraKind(rank=8), sites), size, costs)
    assert plan.encoding_of(0) is Encoding.ADAPTER_GRADIENT
    assert plan.encoding_of(1) is Encoding.ACTIVATIONS
