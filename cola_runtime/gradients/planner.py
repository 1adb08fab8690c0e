"""Chooses how a job's taps travel. Pure and torch-free; docs/encodings.md has the model with examples.

For every input group (the sites that share one x), each encoding e that all its kinds have costs, per
optimizer step,

    seconds(e) = bytes up / link bytes per second + base FLOPs / base FLOP/s + device FLOPs / device FLOP/s

and the cheapest is taken; on a tie the one that leaves the base model less to do. With N tokens a
microbatch, P weights at a site, and r the rank, per microbatch (taps leave microbatch by microbatch,
whatever the encoding):

    encoding          numbers up                            base FLOPs         device FLOPs
    activations       N d_in for the group, N d_out a site  0                  4 N P (kind linear: 2 N P)
    weight_gradient   d_out (d_in + 1) a site               2 N d_in d_out     4 r d_in d_out (linear: 0)
    adapter_gradient  P a site                              2 N P (L-LoRA 4)   0

At an embedding d_in is 1, an id of four bytes, but for what is V wide: P and G.

Activations travel in the base model's dtype, gradients in the adapter's, or where that loses nothing in the
base model's (`travelling_dtypes.py`); what was under a loss scale in the adapter's. Compression narrows all.
Left out: what every encoding costs alike (weights on their way back, the optimizer) and frame headers (88
bytes a tensor). N counts every token: those whose g is zero are dropped on the way, which the coordinator
cannot foresee.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

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
from cola_runtime.adapters.shapes import site_weight_shapes
from cola_runtime.encodings import Compression, Encoding, TapPlan
from cola_runtime.errors import InvalidInput
from cola_runtime.gradients import int8_layout
from cola_runtime.gradients.travelling_dtypes import own_gradient_dtype, product_dtype
from cola_runtime.types import Site

AUTO = "auto"
LOW_RANK = 8
"""k of Compression.LOW_RANK."""

ID_BYTES = 4  # a token's id, which is the whole of an embedding's x; never compressed
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_LEAST_BASE_WORK_FIRST = (Encoding.ACTIVATIONS, Encoding.ADAPTER_GRADIENT, Encoding.WEIGHT_GRADIENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the model takes as given of the service."""

    link_bytes_per_second: float = 125e6
    base_flops: float = 1e11  # matrix products a second of the base model's machine
    device_flops: float = 5e10
    token_budget: int = 1024  # of one base step; a larger microbatch goes in parts, each with its own taps


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What an optimizer step of the job looks like."""

    tokens: float  # N, of one microbatch
    rows: float = 1.0  # of data, of one microbatch: sites of images have positions of their own
    microbatches: int  # m, those that the token budget cuts included
    base_dtype: str  # in which x and g travel
    loss_scaled: bool = False  # g has left the base model's dtype with its scale
    source_tokens: float = 0.0  # N at an encoder-decoder's `source_groups`; `tokens` are its targets'
    source_groups: frozenset[int] = frozenset()

    @property
    def step_tokens(self) -> float:
        return self.microbatches * (self.tokens + self.source_tokens)

    def at(self, group: int) -> Workload:
        """What the sites of one input group see of it."""
        return replace(self, tokens=self.source_tokens) if group in self.source_groups else self


@dataclass(frozen=True, slots=True)
class Effort:
    """What one encoding costs in one optimizer step."""

    bytes_up: float = 0.0
    base_flops: float = 0.0
    device_flops: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(
            self.bytes_up + other.bytes_up,
            self.base_flops + other.base_flops,
            self.device_flops + other.device_flops,
        )

    def seconds(self, costs: Costs) -> float:
        return (
            self.bytes_up / costs.link_bytes_per_second
            + self.base_flops / costs.base_flops
            + self.device_flops / costs.device_flops
        )


_Group = Sequence[tuple[AdapterKind, Sequence[Site]]]
"""The parts of an adapter at one input group, each with its sites there."""


def plan_taps(
    spec: AdapterSpec,
    workload: Workload,
    costs: Costs,
    *,
    requested: str = AUTO,
    compression: Compression = Compression.NONE,
) -> tuple[TapPlan, str]:
    """The plan, and why in a sentence. `requested` is an encoding, or `auto`.

    A head's gradient always travels as it is and is not planned.

    Raises InvalidInput `ENCODING_UNSUPPORTED` or `COMPRESSION_UNSUPPORTED`, naming kind, sites and what is
    possible.
    """
    if spec.body is None:
        plan = TapPlan(Encoding.ADAPTER_GRADIENT, compression=compression)
        return plan, f"{plan}: the head alone is trained{_warning(compression)}"
    spec = spec.body
    if compression is Compression.LOW_RANK:
        _check_low_rank(spec, requested)
        requested = Encoding.WEIGHT_GRADIENT.value
    if requested != AUTO:
        encoding = Encoding(requested)
        check_encoding(spec, encoding)
        plan = TapPlan(encoding, compression=compression)
        return plan, f"{plan}: the job asks for it{_warning(compression)}"
    groups = _groups(spec)
    efforts = {
        number: {
            encoding: group_effort(
                group, workload.at(number), encoding, dtype=spec.dtype, compression=compression
            )
            for encoding in _common_encodings([kind for kind, _ in group])
        }
        for number, group in groups.items()
    }
    chosen = {
        number: min(of_group, key=lambda encoding: of_group[encoding].seconds(costs))
        for number, of_group in efforts.items()
    }
    plan = _folded(chosen, compression)
    total = sum((efforts[number][encoding] for number, encoding in chosen.items()), Effort())
    return plan, _reason(plan, total, costs) + _warning(compression)


def check_encoding(spec: AdapterSpec, encoding: Encoding) -> None:
    """Raises InvalidInput `ENCODING_UNSUPPORTED` unless every kind of the adapter can travel so."""
    for part in spec.parts:
        possible = encodings_of(part.kind)
        if encoding not in possible:
            raise InvalidInput(
                "ENCODING_UNSUPPORTED",
                f"{encoding} needs a kind that is linear in x; {part.kind.kind} at {_pattern(part)} is not",
                where="job.encoding",
                remedy=f"Possible there: auto, {', '.join(possible)}. Nothing was created.",
            )


def encodings_of(kind: AdapterKind) -> tuple[Encoding, ...]:
    """Those that carry the kind's gradient, the one with the least work for the base model first."""
    linear = not isinstance(kind, MlpKind | ModuleKind)
    return _LEAST_BASE_WORK_FIRST if linear else _LEAST_BASE_WORK_FIRST[:2]


def group_effort(
    group: _Group, workload: Workload, encoding: Encoding, *, dtype: str, compression: Compression
) -> Effort:
    """One optimizer step's cost of an input group's taps in one encoding."""
    first = group[0][1][0]
    tokens = workload.tokens if first.positions is None else workload.rows * first.positions
    of_parts = [_part_effort(kind, sites, tokens, encoding, compression=compression) for kind, sites in group]
    once = sum(of_parts, Effort())
    dtypes = [
        travelling_dtype(kind, encoding, workload, dtype=dtype, compression=compression) for kind, _ in group
    ]
    bytes_up = sum(
        of_part.bytes_up * _bytes_a_number(travelling, compression)
        for of_part, travelling in zip(of_parts, dtypes, strict=True)
    )
    if encoding is Encoding.ACTIVATIONS and first.takes_ids:
        bytes_up += len(group) * tokens * ID_BYTES
    if encoding is Encoding.ACTIVATIONS and workload.loss_scaled:
        outputs = sum(site.out_features for _, sites in group for site in sites)
        wider = _bytes_a_number(dtype, compression) - _bytes_a_number(workload.base_dtype, compression)
        bytes_up += tokens * outputs * wider
    return Effort(
        workload.microbatches * bytes_up,
        workload.microbatches * once.base_flops,
        workload.microbatches * once.device_flops,
    )


def travelling_dtype(
    kind: AdapterKind, encoding: Encoding, workload: Workload, *, dtype: str, compression: Compression
) -> str:
    """Of a kind's taps before they are rounded (but of g under loss scaling); `dtype` is the adapter's."""
    if encoding is Encoding.ACTIVATIONS:
        return workload.base_dtype
    if compression is Compression.LOW_RANK:  # its factors are made in the adapter's
        return dtype
    base, scaled = workload.base_dtype, workload.loss_scaled
    if encoding is Encoding.WEIGHT_GRADIENT:
        return product_dtype(base=base, adapter=dtype, loss_scaled=scaled)
    return own_gradient_dtype(kind, base=base, adapter=dtype, loss_scaled=scaled)


def _part_effort(
    kind: AdapterKind, sites: Sequence[Site], tokens: float, encoding: Encoding, *, compression: Compression
) -> Effort:
    """`bytes_up` counts numbers here."""
    inputs, outputs = sites[0].in_features, sum(site.out_features for site in sites)
    takes_ids = sites[0].takes_ids
    touched = [replace(site, in_features=1) for site in sites] if takes_ids else sites  # by one row of x
    if encoding is Encoding.ACTIVATIONS:
        flops = _device_passes(kind) * tokens * _weights(kind, touched)
        return Effort(tokens * (outputs if takes_ids else inputs + outputs), 0.0, flops)
    if encoding is Encoding.ADAPTER_GRADIENT:
        still = _still_weights(kind, sites)  # their gradient is zero, and not sent
        flops = _base_passes(kind) * tokens * _weights(kind, touched)
        return Effort(_weights(kind, sites) - still, flops, 0.0)
    numbers = outputs * (inputs + 1)
    if compression is Compression.LOW_RANK:
        numbers = LOW_RANK * sum(site.out_features + inputs + 1 for site in sites)
    rank = kind.rank if isinstance(kind, LoraKind | LinearizedLoraKind) else 0
    return Effort(numbers, 2.0 * tokens * touched[0].in_features * outputs, 4.0 * rank * inputs * outputs)


def _weights(kind: AdapterKind, sites: Sequence[Site]) -> int:
    """P of all the sites; 0 for a registered module, whose size is not known here."""
    if isinstance(kind, ModuleKind):
        return 0
    return sum(prod(shape) for site in sites for shape in site_weight_shapes(kind, site).values())


def _still_weights(kind: AdapterKind, sites: Sequence[Site]) -> int:
    if isinstance(kind, LinearizedLoraKind) and kind.initial_b == "zero":
        return sum(kind.rank * site.in_features for site in sites)
    return 0


def _base_passes(kind: AdapterKind) -> float:
    """FLOPs per token and weight, beyond what the forward and backward pass have at hand already."""
    return 4.0 if isinstance(kind, LinearizedLoraKind) and kind.initial_b != "zero" else 2.0


def _device_passes(kind: AdapterKind) -> float:
    """FLOPs per token and weight of the whole gradient from x and g."""
    return 2.0 if isinstance(kind, LinearKind) else 4.0


def _bytes_a_number(dtype: str, compression: Compression) -> float:
    if compression is Compression.BFLOAT16:
        return ITEM_BYTES["bfloat16"]
    if compression is Compression.INT8:
        return int8_layout.payload_bytes(int8_layout.BLOCK_VALUES) / int8_layout.BLOCK_VALUES
    return ITEM_BYTES[dtype]


def _common_encodings(kinds: Sequence[AdapterKind]) -> list[Encoding]:
    """Possible for all kinds at one input, and of known size: a registered module's is not."""
    if any(isinstance(kind, ModuleKind) for kind in kinds):
        return [Encoding.ACTIVATIONS]
    return [e for e in _LEAST_BASE_WORK_FIRST if all(e in encodings_of(kind) for kind in kinds)]


def _groups(spec: AdapterSpec) -> dict[int, _Group]:
    groups: dict[int, list[tuple[AdapterKind, Sequence[Site]]]] = {}
    for part in spec.parts:
        for number in dict.fromkeys(site.input_group for site in part.sites):
            sites = [site for site in part.sites if site.input_group == number]
            groups.setdefault(number, []).append((part.kind, sites))
    return dict(sorted(groups.items()))


def _folded(chosen: Mapping[int, Encoding], compression: Compression) -> TapPlan:
    """The most frequent encoding, and the groups that have another one."""
    encoding = Counter(chosen.values()).most_common(1)[0][0]
    others = tuple((number, other) for number, other in chosen.items() if other is not encoding)
    return TapPlan(encoding, others, compression)


def _check_low_rank(spec: AdapterSpec, requested: str) -> None:
    odd = next((part for part in spec.parts if not isinstance(part.kind, LinearKind)), None)
    if odd is not None:
        raise InvalidInput(
            "COMPRESSION_UNSUPPORTED",
            f"low_rank is for kind linear; {odd.kind.kind} at {_pattern(odd)} has other gradients",
            where="job.compression",
            remedy="Possible there: none, bfloat16, int8. Nothing was created.",
        )
    if requested not in (AUTO, Encoding.WEIGHT_GRADIENT):
        raise InvalidInput(
            "COMPRESSION_UNSUPPORTED",
            f"low_rank compresses weight gradients, and the job asks for {requested}",
            where="job.compression",
            remedy="Use encoding auto or weight_gradient. Nothing was created.",
        )


def _pattern(part: AdapterPart) -> str:
    """The sites' last names, as target_modules has them."""
    return ", ".join(dict.fromkeys(site.name.rpartition(".")[2] for site in part.sites))


def _reason(plan: TapPlan, total: Effort, costs: Costs) -> str:
    text = (
        f"{plan}: the least time at {costs.link_bytes_per_second / 1e6:.4g} MB/s, "
        f"{total.bytes_up / 1e6:.3g} MB up and {total.seconds(costs):.2g} s a step"
    )
    if not plan.exceptions:
        return text
    counts = Counter(encoding for _, encoding in plan.exceptions)
    others = ", ".join(f"{encoding} at {count}" for encoding, count in counts.items())
    return f"{text}; {plan.encoding} but {others} of the inputs"


def _warning(compression: Compression) -> str:
    return "" if compression is Compression.NONE else f"; {compression} is lossy (docs/encodings.md)"
