"""Gathers one version of one adapter from its devices; only what is complete from all of them counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cola_runtime.adapter_spec import LeaseTerms
from cola_runtime.adapters.adapter import torch_dtype
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.adapters.shards import shard_specs
from cola_runtime.base_model.received_chain import ReceivedChain, chains_of
from cola_runtime.base_model.shard_inbox import ShardInbox
from cola_runtime.errors import Fenced
from cola_runtime.gradients.norms import global_norm
from cola_runtime.proto import control_pb2
from cola_runtime.transport.reader import ReceivedTensor
from cola_runtime.types import Lease, TensorKey


@dataclass(frozen=True, slots=True, kw_only=True)
class SentShard:
    """One device's part of an update, and where it belongs."""

    weights_P: Tensor
    stated: bytes  # its link, as the device says
    chain: ReceivedChain


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """All weights of one version of an adapter, and what devices and counters say about the step."""

    lease: Lease
    terms: LeaseTerms
    version: int
    weights: dict[TensorKey, Tensor]
    learning_rate: float
    gradient_norm: float
    device_seconds: float
    bytes_up: int
    bytes_down: int
    shards: tuple[SentShard, ...]

    def follow_chains(self) -> tuple[str, ...]:
        """The links of this version by shard, hex. Update by update in their order, beside the event loop.

        Raises Conflict as `ReceivedChain.follow`.
        """
        return tuple(
            shard.chain.follow(self.version, shard.weights_P, stated=shard.stated).hex()
            for shard in self.shards
        )


class LeasedAdapter:
    """What the base model knows of one lease: which device updates what, from which version."""

    def __init__(self, lease: Lease, terms: LeaseTerms) -> None:
        self.lease = lease
        self.terms = terms
        shards = shard_specs(terms.spec, len(lease.device_ids))
        self._inboxes = {
            device_id: ShardInbox(spec) for device_id, spec in zip(lease.device_ids, shards, strict=True)
        }
        chains = chains_of(lease.job_id, lease.epoch, terms.origins, shards=len(shards))
        self._chains = dict(zip(lease.device_ids, chains, strict=True))
        self._device_of = {
            site.index: device_id
            for device_id, spec in zip(lease.device_ids, shards, strict=True)
            for site in spec.sites
        }
        self._bytes_up: dict[int, int] = {}
        self._bytes_down: dict[int, int] = {}

    def device_of(self, site: int) -> str:
        """Whose shard the site is in."""
        return self._device_of.get(site, self.lease.device_id)

    def count_up(self, version: int, wire_bytes: int) -> None:
        """Count bytes sent to the devices for the step that leaves `version`."""
        self._bytes_up[version] = self._bytes_up.get(version, 0) + wire_bytes

    def add(self, received: ReceivedTensor, *, device_id: str) -> None:
        """Take one weight of a coming version; a fault is kept and told by `complete`."""
        self._inboxes[device_id].add(received)

    def add_norms(self, message: control_pb2.ShardNorms, *, device_id: str, wire_bytes: int) -> float | None:
        """The norm of the whole adapter's gradient, once every shard's norms of this step are there.

        Raises ProtocolError `NORMS_INVALID`.
        """
        self._inboxes[device_id].take_norms(message)
        self._count_down(message.version, wire_bytes)
        inboxes = self._inboxes.values()
        if any(inbox.normed_version != message.version for inbox in inboxes):
            return None
        norms = {key: norm for inbox in inboxes for key, norm in inbox.norms.items()}
        in_order = [norms[key] for key in weight_shapes(self.terms.spec)]
        return float(global_norm(torch.tensor(in_order, dtype=torch_dtype(self.terms.spec))))

    def complete(self, end: control_pb2.UpdateEnd, *, device_id: str, wire_bytes: int) -> Update | None:
        """The whole update, once every shard's is complete.

        Raises ProtocolError, or Conflict STEP_OUT_OF_ORDER for a version out of turn.
        """
        of_weights = self._inboxes[device_id].complete(end)
        self._count_down(end.version - 1, of_weights + wire_bytes)
        inboxes = self._inboxes.values()
        ends = [inbox.end for inbox in inboxes if inbox.end is not None and inbox.version == end.version]
        if len(ends) < len(self._inboxes):
            return None
        handed_over = [inbox.hand_over() for inbox in inboxes]
        update = Update(
            lease=self.lease,
            terms=self.terms,
            version=end.version,
            weights={key: weight for _, weights in handed_over for key, weight in weights.items()},
            learning_rate=end.learning_rate,
            gradient_norm=end.gradient_norm,
            device_seconds=sum(of_shard.device_seconds for of_shard in ends),
            bytes_up=self._bytes_up.pop(end.version - 1, 0),
            bytes_down=self._bytes_down.pop(end.version - 1, 0),
            shards=tuple(
                SentShard(weights_P=weights_P, stated=of_shard.chain, chain=chain)
                for (weights_P, _), of_shard, chain in zip(
                    handed_over, ends, self._chains.values(), strict=True
                )
            ),
        )
        self._forget_before(end.version)
        return update

    def _count_down(self, version: int, wire_bytes: int) -> None:
        self._bytes_down[version] = self._bytes_down.get(version, 0) + wire_bytes

    def _forget_before(self, version: int) -> None:
        for counts in (self._bytes_up, self._bytes_down):
            for older in [each for each in counts if each < version]:
                del counts[older]


class LeaseTable:
    """The leases that the base model honours. Rising epochs only."""

    def __init__(self) -> None:
        self._adapters: dict[str, LeasedAdapter] = {}

    def open(self, lease: Lease, terms: LeaseTerms) -> None:
        """Honour `lease` instead of any older one. Raises Fenced for an older epoch; again is no change."""
        current = self._adapters.get(lease.job_id)
        if current is not None and (current.lease, current.terms) == (lease, terms):
            return
        if current is not None and lease.epoch <= current.lease.epoch:
            raise Fenced("FENCED", "an older lease", limit=current.lease.epoch, actual=lease.epoch)
        self._adapters[lease.job_id] = LeasedAdapter(lease, terms)

    def end(self, job_id: str, epoch: int) -> bool:
        """Stop honouring the lease, unless a newer one has come; True if it was honoured."""
        current = self._adapters.get(job_id)
        if current is None or current.lease.epoch > epoch:
            return False
        del self._adapters[job_id]
        return True

    def find(self, lease: Lease) -> LeasedAdapter | None:
        """The adapter if exactly this lease, or the one that this is a device's part of, is honoured."""
        current = self._adapters.get(lease.job_id)
        return current if current is not None and current.lease.covers(lease) else None

    def of(self, job_id: str, *, epoch: int, device_id: str) -> LeasedAdapter | None:
        return self.find(Lease(job_id=job_id, epoch=epoch, device_id=device_id))

    def refusal(self, lease: Lease) -> tuple[str, str]:
        """Reason and message for a lease that is not honoured."""
        current = self._adapters.get(lease.job_id)
        if current is None:
            return "LEASE_UNKNOWN", "the base model holds no lease of this job"
        return "FENCED", f"epoch {current.lease.epoch} on {current.lease.devices} holds this job"
