"""Collaborating tenants on a tiny model, and the same in plain torch with explicitly merged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import AdapterKind, AdapterPart, AdapterSpec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding
from cola_runtime.rows import Row
from cola_runtime.testing.ordinary_modules import OrdinaryAdapter, wide_norms
from cola_runtime.testing.peft_reference import batch_loss
from cola_runtime.types import Gang, Membership, Segment, Site, SiteKind, TensorKey
from tests.base_model.mixed_samples import Tenant, Weights, random_row

MEAN = Gang(name="group/a-name-that-nobody-guesses", combine="mean")
SUM = Gang(name="group/a-name-that-nobody-guesses", combine="sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collaborator:
    """A tenant and its place in a gang."""

    tenant: Tenant
    membership: Membership

    def install(self, model: TappedModel, weights: Weights | None = None, *, version: int = 0) -> None:
        weights = self.tenant.weights if weights is None else weights
        lease, spec = self.tenant.lease, self.tenant.spec
        model.install(lease, spec, version, weights, membership=self.membership)

    def segment(self, encoding: Encoding = Encoding.ACTIVATIONS) -> Segment:
        return replace(self.tenant.segment(encoding), gang=self.membership.gang)


def collaborator(
    number: int, kind: AdapterKind, sites: tuple[Site, ...], gang: Gang, *, dtype: str = "float64"
) -> Collaborator:
    """Random weights everywhere; membership weights 1, 2, 3, ..."""
    spec = AdapterSpec(parts=(AdapterPart(kind=kind, sites=sites),), seed=number, dtype=dtype)
    draw = torch.Generator().manual_seed(number)
    weights = {
        key: weight + 0.1 * torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight.dtype)
        for key, weight in initial_weights(spec).items()
    }
    lengths = [(17, 9), (29,), (5, 21), (12,)][number % 4]
    rows = tuple(random_row(length, seed=100 * number + k) for k, length in enumerate(lengths))
    tenant = Tenant(job_id=f"job-{number}", spec=spec, weights=weights, rows=rows)
    return Collaborator(tenant=tenant, membership=Membership(gang=gang, weight=1.0 + number))


def alone(member: Collaborator) -> Collaborator:
    """The same tenant merged alone."""
    gang = Gang(name=f"job/{member.tenant.job_id}", combine="sum")
    return replace(member, membership=Membership(gang=gang))


def shares_of(members: Sequence[Collaborator]) -> list[float]:
    weights = [member.membership.weight for member in members]
    mean = members[0].membership.gang.combine == "mean"
    return [weight / sum(weights) if mean else weight for weight in weights]


class PlainMerged:
    """A stock transformers model whose weights are W0 + sum_k p_k delta_k, written out."""

    def __init__(self, path: Path, dtype: str = "float64") -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self._model.requires_grad_(False).eval()
        wide_norms(self._model)
        self._biases: dict[str, Tensor] = {}
        for name, module in self._model.named_modules():
            module.register_forward_hook(lambda _m, _args, output, name=name: self._biased(name, output))

    def loss(self, deltas: Mapping[Site, tuple[Tensor, Tensor]], rows: Sequence[Row]) -> Tensor:
        """Mean label loss of the rows under W0 + delta [I, O] and bias [O] at every site."""
        merged = {}
        for site, (delta_IO, _) in deltas.items():
            name = f"{site.name}.weight"
            delta = delta_IO if site.kind is SiteKind.CONV1D else delta_IO.T
            merged[name] = self._model.get_parameter(name) + delta
        self._biases = {site.name: bias for site, (_, bias) in deltas.items()}

        def model(**inputs: Any) -> Any:
            return torch.func.functional_call(self._model, merged, kwargs=inputs)

        return batch_loss(model, rows)

    def _biased(self, name: str, output: Any) -> Any:
        return output + self._biases[name] if name in self._biases else output


class PlainAdapter:
    """One tenant's adapter as ordinary modules."""

    def __init__(self, spec: AdapterSpec, weights: Weights) -> None:
        self._modules = {site: OrdinaryAdapter(spec.kinds[site.index], site, weights) for site in spec.sites}
        self.named: dict[TensorKey, Tensor] = {
            key: parameter for module in self._modules.values() for key, parameter in module.named.items()
        }

    def deltas(self) -> dict[Site, tuple[Tensor, Tensor]]:
        """s a(I) without its bias, [I, O], and the bias, [O]: what the module does to a unit matrix."""
        found = {}
        for site, module in self._modules.items():
            unit = torch.eye(site.in_features, dtype=next(iter(self.named.values())).dtype)
            bias = module(torch.zeros_like(unit[:1]))
            found[site] = (module(unit) - bias, bias[0])
        return found


def summed(
    adapters: Sequence[PlainAdapter], shares: Sequence[float], own: int | None = None
) -> dict[Site, tuple[Tensor, Tensor]]:
    """sum_k p_k delta_k. The gradient reaches adapter `own` with coefficient 1 and nobody else.

    None: the joint function, whose gradient reaches every adapter with its p.
    """
    total: dict[Site, tuple[Tensor, Tensor]] = {}
    for k, (adapter, share) in enumerate(zip(adapters, shares, strict=True)):
        for site, delta in adapter.deltas().items():
            parts = [_share(part, share, joint=own is None, own=own == k) for part in delta]
            before = total.get(site)
            total[site] = (
                (parts[0], parts[1]) if before is None else (before[0] + parts[0], before[1] + parts[1])
            )
    return total


def _share(part: Tensor, share: float, *, joint: bool, own: bool) -> Tensor:
    if joint:
        return share * part
    fixed = share * part.detach()
    return fixed + (part - part.detach()) if own else fixed


def collaboration_gradients(
    plain: PlainMerged, members: Sequence[Collaborator], rows_of: int, own: int | None
) -> list[Weights]:
    """Autograd of the loss of member `rows_of`'s rows; see `summed` for `own`. One dict per member."""
    adapters = [PlainAdapter(member.tenant.spec, member.tenant.weights) for member in members]
    plain.loss(summed(adapters, shares_of(members), own), members[rows_of].tenant.rows).backward()
    return [
        {key.gradient: torch.zeros_like(p) if p.grad is None else p.grad for key, p in adapter.named.items()}
        for adapter in adapters
    ]
