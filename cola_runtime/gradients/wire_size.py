"""How large the tensors are that an adapter's taps travel in: `planner.py`'s numbers, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from cola_runtime.adapter_spec import AdapterKind, AdapterSpec, HeadKind, LinearizedLoraKind
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.encodings import Compression, Encoding, TapPlan
from cola_runtime.gradients import int8_layout
from cola_runtime.gradients.planner import ID_BYTES, ITEM_BYTES, LOW_RANK, Workload, travelling_dtype
from cola_runtime.types import Site, TensorKind


def tap_bytes(spec: AdapterSpec, plan: TapPlan, workload: Workload) -> list[list[int]]:
    """Payload bytes of every tensor that one microbatch of `workload` sends, by part and input group.

    Exact but for activations, where every token counts: those whose gradient is zero are not sent.
    """
    groups = []
    for part in spec.parts:
        for group in dict.fromkeys(site.input_group for site in part.sites):
            sites = [site for site in part.sites if site.input_group == group]
            groups.append([*_of_group(part.kind, sites, plan, workload.at(group), spec.dtype)])
    return groups


def _of_group(
    kind: AdapterKind, sites: Sequence[Site], plan: TapPlan, workload: Workload, dtype: str
) -> Iterator[int]:
    encoding = plan.encoding_of(sites[0].input_group)
    if isinstance(kind, HeadKind):
        encoding = Encoding.ADAPTER_GRADIENT
    travelling = travelling_dtype(kind, encoding, workload, dtype=dtype, compression=plan.compression)
    if encoding is Encoding.ADAPTER_GRADIENT:
        for site in sites:
            for key, shape in site_weight_shapes(kind, site).items():
                if not _stands_still(kind, key.kind):
                    yield _payload(prod(shape), travelling, plan.compression)
    elif encoding is Encoding.WEIGHT_GRADIENT:
        for site in sites:
            rows, columns = site.out_features, site.in_features + 1
            low_rank = plan.compression is Compression.LOW_RANK
            numbers = min(LOW_RANK, rows, columns) * (rows + columns) if low_rank else rows * columns
            yield _payload(numbers, travelling, plan.compression)
    else:
        yield from _activations(sites, plan, workload, dtype)


def _activations(sites: Sequence[Site], plan: TapPlan, workload: Workload, dtype: str) -> Iterator[int]:
    first = sites[0]
    tokens = round(workload.tokens if first.positions is None else workload.rows * first.positions)
    if first.takes_ids:
        yield tokens * ID_BYTES
    else:
        yield _payload(tokens * first.in_features, workload.base_dtype, plan.compression)
    of_gradients = dtype if workload.loss_scaled else workload.base_dtype
    for site in sites:
        yield _payload(tokens * site.out_features, of_gradients, plan.compression)


def _stands_still(kind: AdapterKind, tensor: TensorKind) -> bool:
    """Its gradient is zero, and not sent."""
    a_alone = isinstance(kind, LinearizedLoraKind) and kind.initial_b == "zero"
    return a_alone and tensor is TensorKind.DELTA_A


def _payload(numbers: int, dtype: str, compression: Compression) -> int:
    if compression is Compression.INT8:
        return int8_layout.payload_bytes(numbers)
    return numbers * ITEM_BYTES["bfloat16" if compression is Compression.BFLOAT16 else dtype]
