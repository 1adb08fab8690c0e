"""Device side: sums the taps of one adapter, in whatever encoding and order they arrive, into its gradient.

Shapes: N rows, I in_features, O out_features. Knows nothing of frames, leases or optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec, input_dropout
from cola_runtime.adapters.adapter import site_adapters, torch_dtype
from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.adapters.site_adapter import Gradients, LinearSiteAdapter, Weights
from cola_runtime.errors import ProtocolError
from cola_runtime.gradients.compression import product_of_factors
from cola_runtime.gradients.packed import PackedKeys
from cola_runtime.gradients.surrogate import KeptTaps
from cola_runtime.machine import ALIGNMENT_BYTES
from cola_runtime.types import Site, TensorKey, TensorKind


@dataclass(slots=True)
class _InputGroup:
    """The sites of one part that share one x, and what of the tap under way is still unpaired.

    Under dropout each site is alone: x comes with its mask.
    """

    sites: dict[int, Site]  # the first one's index keys INPUT
    input_NI: Tensor | None = None  # in spec.dtype (ids: int32 [N, 1]); freed after the group's last gradient
    waiting: dict[int, Tensor] = field(default_factory=dict)  # site -> g that came before x
    paired: set[int] = field(default_factory=set)

    @property
    def first(self) -> Site:
        return next(iter(self.sites.values()))

    @property
    def is_open(self) -> bool:
        return self.input_NI is not None or bool(self.waiting)


@dataclass(slots=True)
class _Run:
    """Tensors `first` to `stop` of the gradient: neighbours there and from `start` on in a pack's vector."""

    first: int
    stop: int
    start: int
    numbers: int


class GradientAccumulator:
    """Gradient of one adapter, summed over microbatches in spec.dtype, in one vector [P] (`FlatLayout`).

    `adapter_gradient` taps are added as they come, `weight_gradient` taps go through the kind's mathematics.
    Of `activations` taps, each pair (x, g) does so as soon as both are there, and is freed: memory is the
    adapter's gradient plus open pairs. One tap of an input group (x, a g per site) ends before its next one
    begins.

    With `keep_taps` every pair stays until `clear`, for `surrogate_gradients`; there must be x and g then.
    """

    def __init__(self, spec: AdapterSpec, *, keep_taps: bool = False) -> None:
        self._adapters = site_adapters(spec)
        self._kept = KeptTaps(self._adapters) if keep_taps else None
        self._dtype = torch_dtype(spec)
        self._sites = {site.index: site for site in spec.sites}
        self._layout = FlatLayout(spec)
        self._gradient_P = torch.zeros(self._layout.numel, dtype=self._dtype)
        views = self._layout.views(self._gradient_P)
        self._gradients = {key.gradient: view for key, view in views.items()}
        self._numbers = {key: number for number, key in enumerate(self._gradients)}
        self._begun = np.zeros(len(self._gradients), dtype=bool)  # whose first term of this step has come
        self._runs: WeakKeyDictionary[PackedKeys, list[_Run]] = WeakKeyDictionary()
        self._groups: dict[int, _InputGroup] = {}  # by site
        for part in spec.parts:
            groups: dict[int, _InputGroup] = {}
            for site in sorted(part.sites, key=lambda site: site.index):
                number = -1 - site.index if input_dropout(part.kind) else site.input_group
                group = groups.setdefault(number, _InputGroup(sites={}))
                group.sites[site.index] = site
                self._groups[site.index] = group

    @property
    def complete(self) -> bool:
        """No pair is open: every x has met the gradients of all its sites."""
        return not any(group.is_open for group in self._groups.values())

    def add(self, key: TensorKey, tensor: Tensor, weights: Mapping[TensorKey, Tensor]) -> None:
        """Add one tensor of a tap; `weights` are those that the tap was taken at.

        Keeps no reference to `tensor` beyond its pair, unless taps are kept. Changes nothing when it raises
        ProtocolError `TENSOR_INVALID` for a site, kind, shape or dtype that this adapter does not have; with
        kept taps `INNER_STEPS_NEED_ACTIVATIONS` for another encoding, QuotaExceeded `TAPS_TOO_LARGE`.
        """
        site = self._sites.get(key.site)
        if site is None:
            raise _invalid(f"site {key.site}", f"one of sites {sorted(self._sites)}", f"site {key.site}")
        if key.kind is TensorKind.INPUT:
            self._add_input(site, tensor, weights)
        elif key.kind is TensorKind.OUTPUT_GRADIENT:
            self._add_output_gradient(site, tensor, weights)
        elif self._kept is not None:
            raise ProtocolError(
                "INNER_STEPS_NEED_ACTIVATIONS",
                f"more inner steps than one need x and g of site {site.name!r}, got {key.kind.name}",
                where=site.name,
            )
        elif key.kind is TensorKind.WEIGHT_GRADIENT:
            self._add_product(site, tensor, weights)
        elif key.kind is TensorKind.WEIGHT_GRADIENT_FACTORS:
            self._add_product(site, _product(site, tensor), weights)
        elif key in self._gradients:
            self._add_gradient(site, key, tensor)
        else:
            raise _invalid(site.name, "a tap or a gradient of its kind", key.kind.name)

    def add_packed(self, packed: PackedKeys, vector: Tensor, weights: Mapping[TensorKey, Tensor]) -> None:
        """`add` of every tensor in `vector`; gradients that are neighbours in both go in one operation."""
        runs = self._runs_of(packed)
        if runs and vector.dtype in (self._dtype, torch.bfloat16):
            for run in runs:
                self._sum(run.first, run.stop, vector[run.start : run.start + run.numbers])
            return
        for key, shape, part in zip(
            packed.keys, packed.shapes, torch.split(vector, packed.sizes), strict=True
        ):
            self.add(key, part.view(shape), weights)

    def _runs_of(self, packed: PackedKeys) -> list[_Run]:
        """[] for what is not all gradients of this adapter in their shapes: `add` says what it is."""
        runs = self._runs.get(packed)
        if runs is None:
            own = self._kept is None and all(
                key in self._gradients and self._gradients[key].shape == shape
                for key, shape in zip(packed.keys, packed.shapes, strict=True)
            )
            numbers = [self._numbers[key] for key in packed.keys] if own else []
            runs = self._runs[packed] = _runs(numbers, packed.sizes)
        return runs

    def gradients(self) -> dict[TensorKey, Tensor]:
        """The gradient of every weight, in its shape: views of `gradient_vector`, with its errors."""
        self.gradient_vector()
        return dict(self._gradients)

    def gradient_vector(self) -> Tensor:
        """[P]: the gradient of every weight, zeros where no tap arrived.

        It is the accumulator's own, valid until `clear`. Raises ProtocolError `TAP_INCOMPLETE` while a pair
        is open.
        """
        open_sites = sorted({group.first.name for group in self._groups.values() if group.is_open})
        if open_sites:
            raise ProtocolError(
                "TAP_INCOMPLETE", f"taps are incomplete at the inputs of {', '.join(open_sites)}"
            )
        starts = self._layout.starts
        for number in np.flatnonzero(~self._begun):
            self._gradient_P[starts[number] : starts[number + 1]] = 0.0
        self._begun[:] = True
        return self._gradient_P

    def surrogate_gradients(self, weights: Weights, start: Weights) -> dict[TensorKey, Tensor]:
        """The gradient of the kept taps' surrogate at `weights`; they were taken at `start`. New tensors."""
        assert self._kept is not None
        return self._kept.gradients(weights, start)

    def clear(self) -> None:
        """Begin the next step's sums in the same memory; drop open pairs and kept taps."""
        if self._kept is not None:
            self._kept.clear()
        self._begun[:] = False
        for group in self._groups.values():
            _close(group)

    def _add_gradient(self, site: Site, key: TensorKey, tensor: Tensor) -> None:
        total = self._gradients[key]
        _check_shape(site, tensor, tuple(total.shape))
        if tensor.dtype not in (total.dtype, torch.bfloat16):  # the latter of a compressed tap
            raise _invalid(site.name, str(total.dtype), str(tensor.dtype))
        self._sum_one(key, tensor)

    def _add_product(self, site: Site, tensor: Tensor, weights: Mapping[TensorKey, Tensor]) -> None:
        adapter = self._adapters[site.index]
        if not isinstance(adapter, LinearSiteAdapter):
            raise _invalid(site.name, "x and g, as it is not linear in x", "a weight gradient")
        if not tensor.is_floating_point():
            raise _invalid(site.name, "a floating point dtype", str(tensor.dtype))
        _check_shape(site, tensor, (site.out_features, site.in_features + 1))
        with torch.no_grad():
            product = _aligned(tensor.to(self._dtype))
            self._add_all(adapter.gradient_of_product(product[:, :-1], product[:, -1], weights))

    def _add_input(self, site: Site, tensor: Tensor, weights: Mapping[TensorKey, Tensor]) -> None:
        group = self._groups[site.index]
        if site is not group.first:
            raise _invalid(
                site.name, f"the input under its group's first site {group.first.name!r}", "its own"
            )
        if group.input_NI is not None:
            raise _invalid(site.name, "the open tap's remaining gradients", "a second input")
        if site.takes_ids:
            _check_ids(site, tensor, _open_rows(group))
        else:
            _check_tap(site, tensor, _open_rows(group), site.in_features)
        self._reserve(tensor)
        group.input_NI = tensor if site.takes_ids else _aligned(tensor.to(self._dtype))
        for index in list(group.waiting):
            self._pair(group, group.sites[index], group.waiting.pop(index), weights)

    def _add_output_gradient(self, site: Site, tensor: Tensor, weights: Mapping[TensorKey, Tensor]) -> None:
        group = self._groups[site.index]
        if site.index in group.waiting or site.index in group.paired:
            raise _invalid(site.name, "one gradient a tap", "a second one before the tap was complete")
        _check_tap(site, tensor, _open_rows(group), site.out_features)
        self._reserve(tensor)
        if group.input_NI is None:
            group.waiting[site.index] = tensor
        else:
            self._pair(group, site, tensor, weights)

    def _pair(
        self, group: _InputGroup, site: Site, grad_NO: Tensor, weights: Mapping[TensorKey, Tensor]
    ) -> None:
        assert group.input_NI is not None
        grad_NO = _aligned(grad_NO.to(self._dtype))
        with torch.no_grad():
            self._add_all(self._adapters[site.index].gradient(group.input_NI, grad_NO, weights))
        if self._kept is not None:
            self._kept.keep(site.index, group.input_NI, grad_NO)
        group.paired.add(site.index)
        if len(group.paired) == len(group.sites):
            _close(group)

    def _reserve(self, tensor: Tensor) -> None:
        if self._kept is not None:
            self._kept.reserve(tensor.numel() * self._dtype.itemsize)

    def _add_all(self, gradients: Gradients) -> None:
        for key, gradient in gradients.items():
            self._sum_one(key.gradient, gradient)

    def _sum_one(self, key: TensorKey, gradient: Tensor) -> None:
        number = self._numbers[key]
        self._sum(number, number + 1, gradient.reshape(-1))

    def _sum(self, first: int, stop: int, values: Tensor) -> None:
        """Of tensors `first` to `stop`. A step's first term is written over the last step's sum: cheaper than
        zeroing it and adding.
        """
        starts, begun = self._layout.starts, self._begun[first:stop]
        sums = self._gradient_P[starts[first] : starts[stop]]
        if begun.all():
            sums.add_(values)
        elif not begun.any():
            sums.copy_(values)
            begun[:] = True
        else:
            for number in range(first, stop):
                offset = starts[number] - starts[first]
                size = starts[number + 1] - starts[number]
                self._sum(number, number + 1, values[offset : offset + size])


def _runs(numbers: Sequence[int], sizes: Sequence[int]) -> list[_Run]:
    """Consecutive numbers as one."""
    runs: list[_Run] = []
    start = 0
    for number, size in zip(numbers, sizes, strict=False):
        if runs and runs[-1].stop == number:
            runs[-1].stop += 1
            runs[-1].numbers += size
        else:
            runs.append(_Run(number, number + 1, start, size))
        start += size
    return runs


def _close(group: _InputGroup) -> None:
    group.input_NI = None
    group.waiting.clear()
    group.paired.clear()


def _open_rows(group: _InputGroup) -> int | None:
    """Rows of the tap under way, which all its tensors must have; None if it has not begun."""
    if group.input_NI is not None:
        return len(group.input_NI)
    return next((len(gradient) for gradient in group.waiting.values()), None)


def _aligned(tensor: Tensor) -> Tensor:
    """A copy where it lies anywhere in a message: the same taps give the same bits, wherever they arrive."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


def _product(site: Site, factors_FK: Tensor) -> Tensor:
    """What two low-rank factors stand for."""
    if not factors_FK.is_floating_point() or factors_FK.ndim != 2 or factors_FK.shape[1] < 1:
        raise _invalid(site.name, "two factors of a weight gradient", str(tuple(factors_FK.shape)))
    _check_shape(site, factors_FK, (site.out_features + site.in_features + 1, factors_FK.shape[1]))
    return product_of_factors(factors_FK, site.out_features)


def _check_tap(site: Site, tensor: Tensor, rows: int | None, features: int) -> None:
    if not tensor.is_floating_point():
        raise _invalid(site.name, "a floating point dtype", str(tensor.dtype))
    if tensor.ndim != 2:
        raise _invalid(site.name, f"shape (rows, {features})", f"{tuple(tensor.shape)}")
    _check_shape(site, tensor, (tensor.shape[0] if rows is None else rows, features))


def _check_ids(site: Site, tensor: Tensor, rows: int | None) -> None:
    """An id beyond the table would be read from, and written to, where no weight is."""
    if tensor.dtype is not torch.int32:
        raise _invalid(site.name, "ids in int32", str(tensor.dtype))
    _check_shape(site, tensor, (len(tensor) if rows is None and tensor.ndim else rows or 0, 1))
    if len(tensor) and not 0 <= int(tensor.min()) <= int(tensor.max()) < site.in_features:
        raise _invalid(site.name, f"ids below {site.in_features}", f"{tensor.min()} to {tensor.max()}")


def _check_shape(site: Site, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise _invalid(site.name, f"shape {expected}", f"{tuple(tensor.shape)}")


def _invalid(site: str, expected: str, got: str) -> ProtocolError:
    return ProtocolError("TENSOR_INVALID", f"site {site!r} expects {expected}, got {got}", where=site)
