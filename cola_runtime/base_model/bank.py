"""The bank: adapters' weights resident beside the base model, in its dtype, for the forward pass only.

Of an adapter that is merged into the base weights the bank keeps the numbers as received, in host memory: the
model's device holds one set of merged weights, however many adapters are in it. With a byte limit the others'
are in host memory too, and on the model's device as long as there is room (`residency.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cola_runtime.adapter_spec import AdapterSpec, head_part
from cola_runtime.adapters.adapter import site_adapters
from cola_runtime.adapters.mergeable import check_mergeable
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.adapters.site_adapter import LinearSiteAdapter
from cola_runtime.base_model.accelerator import HOST, Accelerator, PlacedAside
from cola_runtime.base_model.heads import BankedHead
from cola_runtime.base_model.layout import AdapterLayout, layout_key
from cola_runtime.base_model.residency import Residency, Version
from cola_runtime.errors import Fenced, InvalidInput
from cola_runtime.types import UNQUANTIZED, BankUse, Gang, Lease, Membership, Segment, Site, TensorKey


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MergedAdapter:
    """What one version of a merged adapter has instead of stacked blocks; identity is equality."""

    membership: Membership
    sites: dict[int, LinearSiteAdapter]
    weights: dict[int, dict[TensorKey, Tensor]]  # by site, as received, in host memory, all finite

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for of_site in self.weights.values() for weight in of_site.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class BankedAdapter:
    """One version of one adapter; a new version is a new value."""

    lease: Lease
    version: int
    spec: AdapterSpec
    layout: AdapterLayout
    flat: Tensor  # [P] in the base model's dtype; empty for a merged adapter; with a limit in host memory
    merged: MergedAdapter | None = None
    head: BankedHead | None = None

    @property
    def gang(self) -> Gang | None:
        return None if self.merged is None else self.merged.membership.gang

    @property
    def key(self) -> Version:
        return Version(self.lease.job_id, self.lease.epoch, self.version)

    @property
    def nbytes(self) -> int:
        """On the model's device."""
        return self.flat.nbytes + (0 if self.head is None else self.head.nbytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedAdapter:
    """One version's weights as the bank keeps them, on their way to the model's device. Of no gang."""

    layout: AdapterLayout
    flat: PlacedAside
    head: BankedHead | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BankBytes:
    """Where the adapters' weights take memory."""

    model_device: int
    host: int


class AdapterBank:
    """The current version of every leased adapter. Owned by the compute thread, but for `prepare`."""

    def __init__(
        self,
        sites: Sequence[Site],
        dtype: torch.dtype,
        *,
        hidden_size: int = 0,
        tied_sites: Collection[int] = (),
        quantization: str = UNQUANTIZED,
        accelerator: Accelerator = HOST,
        limit_bytes: int | None = None,
    ) -> None:
        """`limit_bytes`: of weights on the model's device at a time; heads, which are small, beside them."""
        self._accelerator = accelerator
        self._residency = None if limit_bytes is None else Residency(limit_bytes, accelerator)
        self._sites = tuple(sites)
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._tied_sites = frozenset(tied_sites)
        self._quantization = quantization
        self._adapters: dict[str, BankedAdapter] = {}
        self._previous: dict[str, BankedAdapter] = {}  # the version before, of those that may be stale by one
        self._layouts: dict[object, AdapterLayout] = {}
        self._making_layout = threading.Lock()

    def install(
        self,
        lease: Lease,
        spec: AdapterSpec,
        version: int,
        weights: Mapping[TensorKey, Tensor],
        *,
        membership: Membership | None = None,
        max_staleness: int = 0,
        prepared: PreparedAdapter | None = None,
    ) -> None:
        """Replace the job's adapter by a copy of this version; non-finite weights reach its own rows only.

        With `max_staleness` 1 the version before stays, for segments that ask for it. `prepared` is what
        `prepare` made of these weights.

        Raises Fenced `FENCED` for an older epoch, InvalidInput `TENSOR_INVALID` for a site that this base
        model does not have, or a missing, superfluous or misshapen tensor, and those of `check_mergeable` for
        a member of a gang; the adapter before stays in place. A member with non-finite weights would reach
        everybody in its gang: it leaves the bank, with InvalidInput `NON_FINITE_ADAPTER`.
        """
        current = self._adapters.get(lease.job_id)
        if current is not None and lease.epoch < current.lease.epoch:
            raise Fenced(
                "FENCED",
                f"weights of {lease.job_id} carry lease epoch {lease.epoch}",
                limit=current.lease.epoch,
                actual=lease.epoch,
            )
        if membership is None:
            prepared = prepared or self.prepare(spec, weights)
            merged, flat, layout, head = None, prepared.flat.arrived(), prepared.layout, prepared.head
        else:
            self._check(spec, weights)
            layout, head = self._layout(spec), BankedHead.of(spec, weights, self._accelerator)
            merged = self._merged(lease.job_id, spec, weights, membership)
            flat = torch.empty(0, dtype=self._dtype)
        before = [self._previous.pop(lease.job_id, None), current]
        if max_staleness and current is not None and (current.lease, current.version + 1) == (lease, version):
            self._previous[lease.job_id] = current
            before.pop()
        installed = BankedAdapter(
            lease=lease,
            version=version,
            spec=spec,
            layout=layout,
            flat=flat,
            merged=merged,
            head=head,
        )
        self._adapters[lease.job_id] = installed
        self._leave(before)
        if self._residency is not None and merged is None:
            self._residency.offer(installed.key, installed.flat)

    def prepare(self, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor]) -> PreparedAdapter:
        """What takes time of an install. From any thread. Raises InvalidInput `TENSOR_INVALID`: see there."""
        self._check(spec, weights)
        layout = self._layout(spec)
        flat = layout.flatten(weights, spec, self._dtype)
        if self._residency is None:
            placed = self._accelerator.placed_aside(flat)
        else:
            placed = PlacedAside(self._accelerator.page_locked(flat) if self._accelerator.is_cuda else flat)
        return PreparedAdapter(
            layout=layout,
            flat=placed,
            head=BankedHead.of(spec, weights, self._accelerator),
        )

    def evict(self, job_id: str) -> None:
        self._leave([self._adapters.pop(job_id, None), self._previous.pop(job_id, None)])

    @property
    def use(self) -> BankUse:
        return BankUse() if self._residency is None else self._residency.use

    @property
    def is_limited(self) -> bool:
        return self._residency is not None

    def expect(self, segments: Iterable[Segment]) -> dict[Version, Tensor]:
        """A base step of these segments is to come: bring their weights, beside whatever is being computed.

        From any thread. What it returns is for `unexpect`, when that step is over.
        """
        if self._residency is None:
            return {}
        adapters = [adapter for each in segments if (adapter := self.adapter_of(each)) is not None]
        wanted = _unmerged(adapters)
        self._residency.expect(wanted)
        return wanted

    def unexpect(self, expected: Mapping[Version, Tensor]) -> None:
        if self._residency is not None:
            self._residency.unexpect(expected)

    def on_device(self, adapters: Sequence[BankedAdapter]) -> list[BankedAdapter]:
        """These, with their weights where the model computes."""
        if self._residency is None:
            return list(adapters)
        placed = self._residency.fetch(_unmerged(adapters))
        return [
            adapter if adapter.merged is not None else replace(adapter, flat=placed[adapter.key])
            for adapter in adapters
        ]

    def _leave(self, adapters: Iterable[BankedAdapter | None]) -> None:
        for adapter in adapters:
            if adapter is not None and self._residency is not None:
                self._residency.forget(adapter.key)

    def version(self, job_id: str) -> tuple[int, int] | None:
        """(lease epoch, version) of the resident adapter."""
        adapter = self._adapters.get(job_id)
        return None if adapter is None else (adapter.lease.epoch, adapter.version)

    def adapter(self, job_id: str) -> BankedAdapter | None:
        return self._adapters.get(job_id)

    def gang(self, gang: Gang | None, asked: Collection[BankedAdapter] = ()) -> tuple[MergedAdapter, ...]:
        """Every resident member of the gang, by job id, in its current version; nobody for None.

        Those of `asked`, which may be the version before, in the version that was asked for.
        """
        versions = {**self._adapters, **{adapter.lease.job_id: adapter for adapter in asked}}
        by_job = [versions[job_id] for job_id in sorted(versions)]
        return tuple(a.merged for a in by_job if a.merged is not None and a.gang == gang)

    @property
    def merged_sites(self) -> set[int]:
        """Sites of all merged adapters, whatever their gangs."""
        merged = (adapter.merged for adapter in self._adapters.values() if adapter.merged is not None)
        return {index for adapter in merged for index in adapter.sites}

    @property
    def nbytes(self) -> BankBytes:
        adapters = [*self._adapters.values(), *self._previous.values()]
        flats = sum(adapter.flat.nbytes for adapter in adapters)
        of_all = sum(adapter.nbytes for adapter in adapters)
        merged = sum(adapter.merged.nbytes for adapter in adapters if adapter.merged is not None)
        if self._residency is None:
            return BankBytes(model_device=of_all, host=merged)
        return BankBytes(
            model_device=of_all - flats + self._residency.use.resident_bytes, host=merged + flats
        )

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
        if adapter.gang != segment.gang:
            return "GANG_MISMATCH"
        return "VERSION_STALE" if self.adapter_of(segment) is None else None

    def _merged(
        self, job_id: str, spec: AdapterSpec, weights: Mapping[TensorKey, Tensor], membership: Membership
    ) -> MergedAdapter:
        check_mergeable(
            spec,
            dtype=str(self._dtype).removeprefix("torch."),
            tied_sites=self._tied_sites,
            quantization=self._quantization,
        )
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            self.evict(job_id)
            raise InvalidInput(
                "NON_FINITE_ADAPTER",
                f"weights of {job_id} are not finite and cannot be merged into the base weights",
                where=job_id,
            )
        current = self._adapters.get(job_id)
        if current is not None and current.merged is not None and current.spec is spec:
            sites = current.merged.sites
        else:
            adapters = site_adapters(spec)
            head = None if spec.head is None else spec.head[1].index  # computed beside the body, never merged
            sites = {
                index: site
                for index, site in adapters.items()
                if isinstance(site, LinearSiteAdapter) and index != head
            }
        copies: dict[int, dict[TensorKey, Tensor]] = {index: {} for index in sites}
        for key, weight in weights.items():
            if key.site in sites:
                copies[key.site][key] = self._accelerator.page_locked(weight.detach())
        return MergedAdapter(membership=membership, sites=sites, weights=copies)

    def _layout(self, spec: AdapterSpec) -> AdapterLayout:
        key = layout_key(spec)
        with self._making_layout:
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


def _unmerged(adapters: Iterable[BankedAdapter]) -> dict[Version, Tensor]:
    return {adapter.key: adapter.flat for adapter in adapters if adapter.merged is None}


def _invalid(where: str, expected: str, got: str) -> InvalidInput:
    return InvalidInput("TENSOR_INVALID", f"expected {expected}, got {got}", where=where)
