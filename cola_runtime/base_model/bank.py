"""The bank: adapters' weights resident beside the base model, in its dtype, for the forward pass only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec, head_part
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.base_model.heads import BankedHead
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
    head: BankedHead | None = None


class AdapterBank:
    """The current version of every leased adapter. Not thread-safe: owned by the compute thread."""

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, *, hidden_size: int = 0) -> None:
        self._sites = tuple(sites)
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._adapters: dict[str, BankedAdapter] = {}
        self._layouts: dict[object, AdapterLayout] = {}

    def install(
        self, lease: Lease, spec: AdapterSpec, version: int, weights: Mapping[TensorKey, Tensor]
    ) -> None:
        """Replace the job's adapter by a copy of this version; non-finite weights reach its own rows only.

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
        self._adapters[lease.job_id] = BankedAdapter(
            lease=lease,
            version=version,
            spec=spec,
            layout=layout,
            flat=flat,
            head=BankedHead.of(spec, weights),
        )

    def evict(self, job_id: str) -> None:
        self._adapters.pop(job_id, None)

    def version(self, job_id: str) -> tuple[int, int] | None:
        """(lease epoch, version) of the resident adapter."""
        adapter = self._adapters.get(job_id)
        return None if adapter is None else (adapter.lease.epoch, adapter.version)

    def adapter(self, job_id: str) -> BankedAdapter | None:
        return self._adapters.get(job_id)

    def refusal(self, segment: Segment) -> str | None:
        """Why these rows may not be computed with what is in the bank: a stable reason, or None."""
        adapter = self._adapters.get(segment.lease.job_id)
        if adapter is None or adapter.lease.epoch < segment.lease.epoch:
            return "ADAPTER_UNKNOWN"
        if adapter.lease.epoch > segment.lease.epoch:
            return "FENCED"
        return None if adapter.version == segment.version else "VERSION_STALE"

    def _layout(self, spec: AdapterSpec) -> AdapterLayout:
        key = layout_key(spec)
        if key not in self._layouts:
            self._layouts[key] = AdapterLayout.of(spec)
        return self._layouts[key]

    def _check(self, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor]) -> None:
        for site in spec.sites:
            if not self._has(site, spec):
                raise _invalid(site.name, "a site of this base model", f"site {site.index}")
        shapes = weight_shapes(spec)
        if shapes.keys() != weights.keys():
            odd = sorted(str(key) for key in shapes.keys() ^ weights.keys())
            raise _invalid("weights", "exactly the tensors of the adapter's sites", ", ".join(odd[:4]))
        for key, shape in shapes.items():
            if tuple(weights[key].shape) != shape:
                name = next(site.name for site in spec.sites if site.index == key.site)
                raise _invalid(f"{name} {key.kind.name}", f"shape {shape}", str(tuple(weights[key].shape)))

    def _has(self, site: Site, spec: AdapterSpec) -> bool:
        if spec.head is not None and site == spec.head[1]:
            expected = head_part(spec.head[0], self._sites, hidden_size=self._hidden_size)
            return site == expected.sites[0]
        return 0 <= site.index < len(self._sites) and self._sites[site.index] == site


def _invalid(where: str, expected: str, got: str) -> InvalidInput:
    return InvalidInput("TENSOR_INVALID", f"expected {expected}, got {got}", where=where)
