"""The planner's bytes are those of real taps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cola_runtime.adapter_spec import (
    AdapterKind,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
)
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Compression, Encoding, TapPlan
from cola_runtime.gradients.compression import TapCompressor
from cola_runtime.gradients.planner import Workload, encodings_of, group_effort
from cola_runtime.gradients.wire_size import tap_bytes
from cola_runtime.transport.tensors import to_wire
from cola_runtime.types import PRODUCT_FLOPS, LossScaling, Segment, TensorKind
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import install_all, run_segments
from tests.base_model.test_adapter_kinds import everywhere

KINDS: list[AdapterKind] = [
    LoraKind(rank=3),
    LoraKind(rank=4),
    LinearKind(bias=True),
    LinearKind(scaling=1.5),
    MlpKind(hidden=5),
    LinearizedLoraKind(rank=2),
    LinearizedLoraKind(rank=2, initial_b="zero"),
]
CASES = [
    (kind, encoding, compression)
    for kind in KINDS
    for encoding in encodings_of(kind)
    for compression in Compression
    if compression is not Compression.LOW_RANK
    or (isinstance(kind, LinearKind) and encoding is Encoding.WEIGHT_GRADIENT)
]


@pytest.fixture(scope="module")
def tapped(tiny_folder: TinyFolder) -> TappedModel:
    return TappedModel.load(tiny_folder("llama", "bfloat16"), dtype="bfloat16", attention="eager")


@pytest.mark.parametrize(("kind", "encoding", "compression"), CASES)
def test_every_input_group_sends_the_bytes_that_were_planned(
    tapped: TappedModel, kind: AdapterKind, encoding: Encoding, compression: Compression
) -> None:
    member = everywhere(1, kind, tapped.catalogue, "float32")  # one row
    install_all(tapped, [member])
    segment = Segment(
        lease=member.lease,
        version=0,
        rows=member.rows,
        loss_denominator=1.0,
        taps=TapPlan(encoding, compression=compression),
    )
    _, taps = run_segments(tapped, [segment])
    compressor = TapCompressor()
    found_sizes: list[int] = []
    for tap in taps:
        sent = compressor.compress(member.lease, compression, tap.tensors)
        found_sizes += [len(to_wire(tensor).data) for tensor in sent.values()]
        sites = [site for site in tapped.catalogue if site.index in {key.site for key in tap.tensors}]
        rows = {len(t) for k, t in tap.tensors.items() if k.kind.name == "INPUT"} or {
            len(member.rows[0].tokens)
        }
        workload = Workload(tokens=rows.pop(), microbatches=1, base_dtype="bfloat16")
        effort = group_effort([(kind, sites)], workload, encoding, dtype="float32", compression=compression)
        found = sum(len(to_wire(tensor).data) for tensor in sent.values())
        # int8: every tensor has a last block that is not full
        slack = 2 * len(sent) if compression is Compression.INT8 else 0
        assert abs(found - effort.bytes_up) <= slack
    if encoding is not Encoding.ACTIVATIONS:  # of those, tokens without a gradient are not sent
        whole = Workload(tokens=1, microbatches=1, base_dtype="bfloat16")
        sizes = tap_bytes(member.spec, segment.taps, whole)
        assert sorted(found_sizes) == sorted(size for of_group in sizes for size in of_group)


@pytest.mark.parametrize("compression", [Compression.NONE, Compression.BFLOAT16])
def test_g_that_was_scaled_travels_in_the_adapters_dtype_and_is_planned_so(
    tiny_folder: TinyFolder, compression: Compression
) -> None:
    tapped = TappedModel.load(tiny_folder("llama", "float16"), dtype="float16", attention="eager")
    member = everywhere(1, LoraKind(rank=3), tapped.sites, "float32")
    install_all(tapped, [member])
    segment = replace(member.segment(Encoding.ACTIVATIONS), loss_scaling=LossScaling(scale=1024.0))
    _, taps = run_segments(tapped, [segment])
    for tap in taps:
        sent = TapCompressor().compress(member.lease, compression, tap.tensors)
        sites = [site for site in tapped.sites if site.index in {key.site for key in tap.tensors}]
        (rows,) = {len(tensor) for tensor in tap.tensors.values()}
        workload = Workload(tokens=rows, microbatches=1, base_dtype="float16", loss_scaled=True)
        effort = group_effort(
            [(LoraKind(rank=3), sites)],
            workload,
            Encoding.ACTIVATIONS,
            dtype="float32",
            compression=compression,
        )
        assert sum(len(to_wire(tensor).data) for tensor in sent.values()) == effort.bytes_up


def test_an_exception_is_for_its_input_group_alone(tapped: TappedModel) -> None:
    member = everywhere(1, LoraKind(rank=3), tapped.sites, "float32")
    install_all(tapped, [member])
    exceptions = ((0, Encoding.ACTIVATIONS), (5, Encoding.WEIGHT_GRADIENT))
    segment = replace(member.segment(), taps=TapPlan(Encoding.ADAPTER_GRADIENT, exceptions))
    _, taps = run_segments(tapped, [segment])
    kinds: dict[int, set[TensorKind]] = {}
    for tap in taps:
        for key in tap.tensors:
            kinds.setdefault(tapped.sites[key.site].input_group, set()).add(key.kind)
    assert kinds.pop(0) == {TensorKind.INPUT, TensorKind.OUTPUT_GRADIENT}
    assert kinds.pop(5) == {TensorKind.WEIGHT_GRADIENT}
    assert all(of == {TensorKind.GRAD_LORA_A, TensorKind.GRAD_LORA_B} for of in kinds.values())
    assert len(kinds) == 10


def test_a_base_model_says_how_fast_it_multiplies(tapped: TappedModel) -> None:
    rate = float(tapped.describe("tiny", "").details[PRODUCT_FLOPS])
    assert 1e8 < rate < 1e16
