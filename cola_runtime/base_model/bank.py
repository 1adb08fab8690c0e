"""The bank: adapters' weights resident beside the base model, in its dtype, for the forward pass only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.base_model.layout import AdapterLayout, layout_key
from cola_runtime.errors import Fenced, InvalidInput
from cola_runtime.types import Lease, Segment, Site, TensorKey


@dataclass(frozen=True, slots=True, kw_only=True)
class BankedAdapter:
    """One version of one adapter; a new version is a new value."""

    lease: Lease
    version: int
    spec: AdapterSpec
    layout: AdapterLayout
    flat: Tensor  # [P] in the base model's dtype


class AdapterBank:
    """The current version of every leased adapter. Not thread-safe: owned by the compute thread."""

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype) -> None:
        self._sites = tuple(sites)
        self._dtype = dtype
        self._adapters: dict[str, BankedAdapter] = {}
        self._previous: dict[str, BankedAdapter] = {}  # the version before, of those that may be stale by one
        self._layouts: dict[object, AdapterLayout] = {}

    def install(
        self,
        lease: Lease,
        spec: AdapterSpec,
        version: int,
        weights: Mapping[TensorKey, Tensor],
        *,
        max_staleness: int = 0,
    ) -> None:
        """Replace the job's adapter by a copy of this version; non-finite weights reach its own rows only.

        With `max_staleness` 1 the version before stays, for segments that ask for it.

        Raises Fenced `FENCED` for an older epoch, InvalidInput `TENSOR_INVALID` for a site that this base
        model does not have, or a missing, superfluous or misshapen tensor; the adapter before stays in place.
        """
        current = self._adapters.get(lease.job_id)
        if current is not None and lease.epoch < current.lease.epoch:
            raise Fenced(
                "FENCED",
                f"weights of {lease.job_id} carry lease epoch {lease.epoch}",
                limit=current.lease.epoch,
                actual=lease.epoch,
            )
        self._check(spec, weights)
        layout = current.layout if current is not None and current.spec is spec else self._layout(spec)
        flat = layout.flatten(weights, spec, self._dtype)
        if max_staleness and current is not None and (current.lease, current.version + 1) == (lease, version):
            self._previous[lease.job_id] = current
        else:
            self._previous.pop(lease.job_id, None)
        self._adapters[lease.job_id] = BankedAdapter(
            lease=lease, version=version, spec=spec, layout=layout, flat=flat
        )

    def evict(self, job_id: str) -> None:
        self._adapters.pop(job_id, None)
        self._previous.pop(job_id, None)

    def version(self, job_id: str) -> tuple[int, int] | None:
        """(lease epoch, version) of the resident adapter."""
        adapter = self._adapters.get(job_id)
        return None if adapter is None else (adapter.lease.epoch, adapter.version)

    def adapter(self, job_id: str) -> BankedAdapter | None:
        return self._adapters.get(job_id)

    def adapter_of(self, segment: Segment) -> BankedAdapter | None:
        """The very version that the segment asks for, under its lease's epoch."""
        for kept in (self._adapters, self._previous):
            adapter = kept.get(segment.lease.job_id)
            if adapter is not None and (adapter.lease.epoch, adapter.version) == (
                segment.lease.epoch,
                segment.version,
            ):
                return adapter
        return None

    def refusal(self, segment: Segment) -> str | None:
        """Why these rows may not be computed with what is in the bank: a stable reason, or None."""
        adapter = self._adapters.get(segment.lease.job_id)
        if adapter is None or adapter.lease.epoch < segment.lease.epoch:
            return "ADAPTER_UNKNOWN"
        if adapter.lease.epoch > segment.lease.epoch:
            return "FENCED"
        return "VERSION_STALE" if self.adapter_of(segment) is None else None

    def _layout(self, spec: AdapterSpec) -> AdapterLayout:
        key = layout_key(spec)
        if key not in self._layouts:
            self._layouts[key] = AdapterLayout.of(spec)
        return self._layouts[key]

    def _check(self, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor]) -> None:
        for site in spec.sites:
            if not 0 <= site.index < len(self._sites) or self._sites[site.index] != site:
                raise _invalid(site.name, "a site of this base model", f"site {site.index}")
        shapes = weight_shapes(spec)
        if shapes.keys() != weights.keys():
            odd = sorted(str(key) for key in shapes.keys() ^ weights.keys())
            raise _invalid("weights", "exactly the tensors of the adapter's sites", ", ".join(odd[:4]))
        for key, shape in shapes.items():
            if tuple(weights[key].shape) != shape:
                name = self._sites[key.site].name
                raise _invalid(f"{name} {key.kind.name}", f"shape {shape}", str(tuple(weights[key].shape)))


def _invalid(where: str, expected: str, got: str) -> InvalidInput:
    return InvalidInput("TENSOR_INVALID", f"expected {expected}, got {got}", where=where)
